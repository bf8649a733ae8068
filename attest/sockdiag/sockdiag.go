// Package sockdiag asks the kernel about the TCP sockets of a network
// namespace over NETLINK_SOCK_DIAG (sock_diag(7)): who listens, which socket
// has a 4-tuple, and destroys sockets that may not go on.
//
// The invariant: the tables are read as they are, never through a socket
// look-up where listeners are concerned. The kernel's exact look-up runs
// sk_lookup programs, our own included, and would name the agent's listener as
// the owner of every port that the agent captures.
package sockdiag

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"ringfence.dev/cni/netns"
)

var (
	// ErrNotFound reports that no socket has the 4-tuple.
	ErrNotFound = errors.New("sockdiag: no such socket")
	// ErrNotSupported reports a kernel without inet_diag, or without SOCK_DESTROY.
	ErrNotSupported = errors.New("sockdiag: not supported by this kernel")
	// ErrClosed reports use of a Conn after Close.
	ErrClosed = errors.New("sockdiag: connection is closed")

	errInterrupted = errors.New("sockdiag: tables changed during the dump")
)

// answerTimeout bounds the wait for the kernel, which answers from within
// sendmsg or recvmsg: only a bug can make it last.
var answerTimeout = unix.Timeval{Sec: 2}

// A dump that the kernel reports as inconsistent is repeated this often.
const attempts = 4

// buffers are for receiving: the kernel fills at most 32 KiB per message
// (netlink_dump in net/netlink/af_netlink.c). Pooled, because a node has
// hundreds of namespaces and few of them are asked at once.
var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// Conn is a netlink socket in one network namespace. It keeps the namespace
// alive. It is safe for concurrent use.
type Conn struct {
	// mu held means fd is open and no answer is outstanding on it.
	mu  sync.Mutex
	fd  int // -1 once closed
	seq uint32
}

// Open opens a socket in the namespace.
func Open(ns *netns.Handle) (*Conn, error) {
	fd, err := ns.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &answerTimeout); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	return &Conn{fd: fd}, nil
}

// Close lets go of the namespace. It may be called twice.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	err := unix.Close(c.fd)
	c.fd = -1
	return err
}

// Listeners returns all listening TCP sockets of both families, MPTCP ones included.
func (c *Conn) Listeners(ctx context.Context) ([]Socket, error) {
	return c.dump(ctx, request{states: 1 << Listen})
}

// ListenersOn is Listeners for one port, filtered by the kernel.
func (c *Conn) ListenersOn(ctx context.Context, port uint16) ([]Socket, error) {
	if port == 0 {
		return nil, fmt.Errorf("listeners on port 0: %w", ErrNotFound)
	}
	return c.dump(ctx, request{states: 1 << Listen, port: port})
}

// Connections returns the sockets that are connected or connecting, both families.
func (c *Conn) Connections(ctx context.Context) ([]Socket, error) {
	return c.dump(ctx, request{states: 1<<Established | 1<<SynSent | 1<<SynRecv | 1<<CloseWait})
}

// dump collects the sockets of both families. Both at once, because a hash
// table walk is what it costs.
func (c *Conn) dump(ctx context.Context, r request) (found []Socket, err error) {
	r.typ, r.flags = typeDump, unix.NLM_F_DUMP
	for range attempts {
		if err = ctx.Err(); err != nil {
			return nil, err
		}
		found = found[:0]
		err = c.ask(r, func(payload []byte) error {
			s, err := parseSocket(payload)
			if err == nil && (r.port == 0 || s.Source.Port() == r.port) {
				found = append(found, s)
			}
			return err
		})
		if !errors.Is(err, errInterrupted) {
			break
		}
	}
	if errors.Is(err, unix.ENOENT) {
		err = ErrNotSupported
	}
	if err != nil {
		return nil, fmt.Errorf("dump TCP sockets: %w", err)
	}
	return found, nil
}

// Find returns the connected or connecting socket whose own address is local
// and whose peer is remote. device is the interface it is bound to, zero for
// none: the kernel does not find a bound socket without it.
func (c *Conn) Find(ctx context.Context, local, remote netip.AddrPort, device uint32) (Socket, error) {
	if err := ctx.Err(); err != nil {
		return Socket{}, err
	}
	local, remote = unmap(local), unmap(remote)
	var got Socket
	err := c.ask(exact(typeByFamily, local, remote, device), func(payload []byte) (err error) {
		got, err = parseSocket(payload)
		return err
	})
	if err == nil && (got.Source != local || got.Destination != remote || got.State == Listen) {
		err = ErrNotFound // the look-up falls back to a listener on the port
	}
	if errors.Is(err, unix.ENOENT) {
		err = ErrNotFound
	}
	if err != nil {
		return Socket{}, fmt.Errorf("find socket %s to %s: %w", local, remote, err)
	}
	return got, nil
}

// Destroy aborts a socket returned by Find or a dump: its owner's next call
// gets ECONNABORTED and the peer a RST. A socket that has ended, or whose
// address was reused since, is [ErrNotFound]. It needs CAP_NET_ADMIN.
func (c *Conn) Destroy(ctx context.Context, s Socket) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r := exact(typeDestroy, s.Source, s.Destination, s.Device)
	r.flags, r.cookie = unix.NLM_F_ACK, s.Cookie
	err := c.ask(r, func([]byte) error { return nil })
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		err = ErrNotFound
	case errors.Is(err, unix.EOPNOTSUPP):
		err = ErrNotSupported
	}
	if err != nil {
		return fmt.Errorf("destroy socket %s to %s: %w", s.Source, s.Destination, err)
	}
	return nil
}

func exact(typ uint16, local, remote netip.AddrPort, device uint32) request {
	r := request{typ: typ, family: unix.AF_INET, states: ^uint32(0), source: local, destination: remote, device: device, cookie: noCookie}
	if local.Addr().Is6() {
		r.family = unix.AF_INET6
	}
	return r
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

// ask sends one request and hands every answer to fn.
func (c *Conn) ask(r request, fn func(payload []byte) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return ErrClosed
	}
	c.seq++
	if err := unix.Sendto(c.fd, r.encode(c.seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	var failure error
	for {
		n, err := c.receive(*buf)
		if err != nil {
			return err
		}
		done, err := messages((*buf)[:n], c.seq, fn)
		if failure == nil {
			failure = err
		}
		// A dump is read to its end even after an error, or the next request
		// on this socket would be refused as busy.
		if done {
			return failure
		}
	}
}

func (c *Conn) receive(buf []byte) (int, error) {
	for {
		n, _, flags, from, err := unix.Recvmsg(c.fd, buf, nil, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, fmt.Errorf("receive: %w", err)
		case flags&unix.MSG_TRUNC != 0:
			return 0, fmt.Errorf("%w: longer than %d bytes", errMalformed, len(buf))
		}
		// Any process may send to our netlink port; only the kernel has pid 0.
		if nl, ok := from.(*unix.SockaddrNetlink); ok && nl.Pid == 0 {
			return n, nil
		}
	}
}

// Find is [Conn.Find] for a single question, on a connection of its own.
func Find(ns *netns.Handle, local, remote netip.AddrPort) (Socket, error) {
	c, err := Open(ns)
	if err != nil {
		return Socket{}, err
	}
	defer c.Close()
	return c.Find(context.Background(), local, remote, 0)
}

// Listeners is [Conn.Listeners] for a single question, on a connection of its own.
func Listeners(ns *netns.Handle) ([]Socket, error) {
	c, err := Open(ns)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Listeners(context.Background())
}
