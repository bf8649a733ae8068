package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy/flow"
)

// searchLimit bounds the walk through /proc for one connection: a second covers
// tens of thousands of processes, and a caller waits for it.
const searchLimit = time.Second

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST alike.
const soOriginalDst = 80

// Origin tells where a captured connection was going. For an outbound one it
// also names the process that holds the calling socket: [workload.ErrGone] when it
// has none any more, [workload.ErrAmbiguous] when different programs hold it.
// A connection that no rule brought is [capture.ErrNoOrigin].
func (b *Backend) Origin(name string, d flow.Direction, fd int, local, remote netip.AddrPort) (flow.Flow, error) {
	sc, err := b.scope(name)
	if err != nil {
		return flow.Flow{}, err
	}
	local, remote = plain(local), plain(remote)
	f := flow.Flow{Scope: name, Direction: d, Source: remote, Destination: local}
	if d == flow.Inbound {
		// TPROXY keeps the packet's own destination. Nothing else than the agent
		// listens on its ports, so that one was dialled straight to the listener.
		if agentPort(local.Port()) {
			return flow.Flow{}, capture.ErrNoOrigin
		}
		return f, nil
	}
	if f.Destination, err = originalDst(fd, local.Addr().Is4()); err != nil {
		return flow.Flow{}, err
	}
	if f.Destination == local {
		return flow.Flow{}, capture.ErrNoOrigin
	}
	ctx, cancel := context.WithTimeout(context.Background(), searchLimit)
	defer cancel()
	sock, err := sc.caller(ctx, f, local)
	if err != nil {
		return flow.Flow{}, fmt.Errorf("find the caller of %v from %v: %w", f.Destination, f.Source, err)
	}
	f.Source, f.Device = sock.Source, sock.Device
	// The workload's own socket says which address the kernel or the program chose.
	if at := sock.Source.Addr().Unmap(); !at.IsLoopback() {
		f.BoundSource = at
	}
	f.Caller, err = b.evidence(ctx, sock)
	return f, err
}

// caller finds the socket at the other end of a redirected connection: its own
// tables know it by where it believes to be connected.
func (sc *scope) caller(ctx context.Context, f flow.Flow, local netip.AddrPort) (sockdiag.Socket, error) {
	// Without sc.mu: it is held for as long as rules are being written.
	diag := sc.diag.Load()
	if diag == nil {
		return sockdiag.Socket{}, capture.ErrNoScope
	}
	sock, err := diag.Find(ctx, f.Source, f.Destination, 0)
	switch {
	case err == nil && sock.Inode != 0:
		return sock, nil
	case err == nil:
		// One that has ended, and that the kernel remembers for a minute. Perhaps the
		// caller's; perhaps another's, whose port conntrack forgot first and gave away.
		err = fmt.Errorf("socket %v has left its process", sock.Source)
	case !errors.Is(err, sockdiag.ErrNotFound):
		return sock, err
	}
	// Two callers with one source port and different destinations would be the same
	// connection after the redirect, so conntrack gave this one another source port.
	source, dest, cerr := originalTuple(diag.ns, f.Source, local)
	if cerr != nil || source == f.Source || dest != f.Destination {
		return sock, fmt.Errorf("%w: %w", workload.ErrGone, err)
	}
	if sock, err = diag.Find(ctx, source, f.Destination, 0); errors.Is(err, sockdiag.ErrNotFound) {
		return sock, fmt.Errorf("%w: %w", workload.ErrGone, err)
	}
	return sock, err
}

// evidence names the one program that holds a socket. Processes that share it
// after a fork are one program when they execute the same file in the same cgroup.
// Its gid is not told: the socket has none, and the attestor reads the process's.
func (b *Backend) evidence(ctx context.Context, s sockdiag.Socket) (workload.Evidence, error) {
	e := workload.Evidence{UID: s.UID, CgroupID: s.CgroupID, Source: workload.SourceSockDiag}
	if s.Inode == 0 {
		return e, fmt.Errorf("socket %v has left its process: %w", s.Source, workload.ErrGone)
	}
	holders, err := b.callers.holders(ctx, s)
	if err != nil {
		return e, err
	}
	if len(holders) == 0 {
		return e, fmt.Errorf("no process holds socket %v: %w", s.Source, workload.ErrGone)
	}
	oldest := slices.MinFunc(holders, func(x, y proc.Holder) int { return cmp.Compare(x.StartTime, y.StartTime) })
	e.Process = oldest.Process
	if e.CgroupID == 0 { // before Linux 5.9 the socket does not tell
		if e.CgroupID, err = b.cgroupOf(oldest); err != nil {
			return e, err
		}
	}
	return e, b.oneProgram(oldest, holders, s)
}

func (b *Backend) cgroupOf(h proc.Holder) (uint64, error) {
	image, err := b.procs.Read(h.PID)
	if err != nil {
		return 0, err
	}
	if !image.Process.Same(h.Process) {
		return 0, fmt.Errorf("process %d is another one by now: %w", h.PID, workload.ErrGone)
	}
	id, err := b.tree.ID(image.Cgroups.V2)
	if err != nil {
		return 0, fmt.Errorf("cgroup of process %d: %w: %w", h.PID, err, workload.ErrGone)
	}
	return id, nil
}

// oneProgram reports holders that are not all the same program.
func (b *Backend) oneProgram(first proc.Holder, holders []proc.Holder, s sockdiag.Socket) error {
	if len(holders) == 1 {
		return nil
	}
	image, err := b.procs.Read(first.PID)
	if err != nil {
		return err
	}
	if !image.Process.Same(first.Process) {
		return fmt.Errorf("holder %d of socket %v: %w", first.PID, s.Source, workload.ErrGone)
	}
	for _, h := range holders {
		if h.PID == first.PID {
			continue
		}
		if other, err := b.procs.Read(h.PID); err != nil || other.Exe.FileID != image.Exe.FileID || other.Cgroups != image.Cgroups {
			return fmt.Errorf("processes %d and %d hold socket %v: %w", first.PID, h.PID, s.Source, workload.ErrAmbiguous)
		}
	}
	return nil
}

// originalDst asks conntrack what a redirected connection's destination was.
func originalDst(fd int, v4 bool) (netip.AddrPort, error) {
	var to netip.AddrPort
	var err error
	if v4 {
		var sa unix.RawSockaddrInet4
		err = getsockopt(fd, unix.SOL_IP, unsafe.Pointer(&sa), unsafe.Sizeof(sa))
		to = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), ntohs(sa.Port))
	} else {
		var sa unix.RawSockaddrInet6
		err = getsockopt(fd, unix.SOL_IPV6, unsafe.Pointer(&sa), unsafe.Sizeof(sa))
		to = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), ntohs(sa.Port))
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOPROTOOPT):
		// Not tracked, or conntrack is not even loaded.
		return to, capture.ErrNoOrigin
	case err != nil:
		return to, fmt.Errorf("ask for the original destination: %w", err)
	}
	return to, nil
}

func getsockopt(fd, level int, value unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), soOriginalDst,
		uintptr(value), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// ntohs turns a port as it lies in a socket address into a number.
func ntohs(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}

func agentPort(p uint16) bool {
	return p == capture.OutboundPort || p == capture.InboundPort || p == capture.TunnelPort
}

func plain(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
