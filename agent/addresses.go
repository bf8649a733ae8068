package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ringfence.dev/cni/netns"
)

// addresses follows the addresses and the directly connected networks of one
// namespace. It is read on every new connection and written when netlink says
// that something changed.
type addresses struct {
	ns    *netns.Handle
	file  *os.File // the netlink socket, in the namespace
	state atomic.Pointer[addressSet]
}

// addressSet is immutable.
type addressSet struct {
	local     map[netip.Addr]struct{}
	connected []netip.Prefix
	primary4  netip.Addr // first global address of the family, invalid for none
	primary6  netip.Addr
	has6      bool // the family exists and has an address other than loopback's
	loUp      bool
}

func newAddresses(ns *netns.Handle) (*addresses, error) {
	fd, err := ns.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	groups := uint32(unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("follow addresses: %w", err)
	}
	a := &addresses{ns: ns, file: os.NewFile(uintptr(fd), "rtnetlink")}
	if err := a.refresh(); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// Close ends Run and frees the netlink socket.
func (a *addresses) Close() error { return a.file.Close() }

// retryAfter is the pause before the tables are read again when that failed: a
// dump that is interrupted by another change is an error too.
const retryAfter = 100 * time.Millisecond

// run keeps the state fresh until Close. Messages are only a sign that something
// changed: a lost one (ENOBUFS) is a sign too, so nothing is ever missed.
func (a *addresses) run(ctx context.Context, log *slog.Logger, changed func()) error {
	rc, err := a.file.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { a.file.Close() })
	defer stop()
	var scratch [512]byte // content does not matter, so short reads are fine
	for {
		var rerr error
		err := rc.Read(func(fd uintptr) bool {
			_, _, rerr = unix.Recvfrom(int(fd), scratch[:], unix.MSG_TRUNC)
			return rerr != unix.EAGAIN && rerr != unix.EINTR
		})
		if err != nil {
			return nil // closed
		}
		if rerr != nil && !errors.Is(rerr, unix.ENOBUFS) {
			return fmt.Errorf("follow addresses: %w", rerr)
		}
		for err := a.refresh(); err != nil; err = a.refresh() {
			log.Debug("read addresses again", "err", err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(retryAfter):
			}
		}
		changed()
	}
}

func (a *addresses) refresh() error {
	set := &addressSet{local: map[netip.Addr]struct{}{}}
	err := a.ns.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, l := range links {
			if up := uint32(unix.IFF_LOOPBACK | unix.IFF_UP); l.Attrs().RawFlags&up == up {
				set.loUp = true
			}
		}
		addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, addr := range addrs {
			set.add(addr)
		}
		return nil
	})
	if err != nil {
		return err
	}
	a.state.Store(set)
	return nil
}

func (s *addressSet) add(addr netlink.Addr) {
	ip, ok := netip.AddrFromSlice(addr.IP)
	if !ok {
		return
	}
	ip = ip.Unmap()
	s.local[ip] = struct{}{}
	if ip.IsLoopback() || ip.IsLinkLocalUnicast() {
		return
	}
	if ip.Is6() {
		s.has6 = true
		if !s.primary6.IsValid() {
			s.primary6 = ip
		}
	} else if !s.primary4.IsValid() {
		s.primary4 = ip
	}
	if ones, bits := addr.Mask.Size(); bits == ip.BitLen() && ones < bits {
		s.connected = append(s.connected, netip.PrefixFrom(ip, ones).Masked())
	}
}

// isLocal reports whether ip is an address of the namespace, loopback included.
func (a *addresses) isLocal(ip netip.Addr) bool {
	if ip.IsLoopback() || ip.IsUnspecified() {
		return true
	}
	_, ok := a.state.Load().local[ip]
	return ok
}

// metadata are the well-known addresses of cloud metadata services. They are
// never probed: some of them count, rate-limit or answer anything.
var metadata = map[netip.Addr]bool{
	netip.MustParseAddr("169.254.169.254"): true,
	netip.MustParseAddr("fd00:ec2::254"):   true,
	netip.MustParseAddr("fd20:ce::254"):    true,
	netip.MustParseAddr("100.100.100.200"): true,
	netip.MustParseAddr("168.63.129.16"):   true,
}

// inMesh reports whether a peer at ip may have an agent. With no networks
// configured those directly connected to the namespace count.
func (a *addresses) inMesh(ip netip.Addr, configured []netip.Prefix) bool {
	if !ip.IsValid() || ip.IsLoopback() || ip.IsUnspecified() || ip.IsMulticast() ||
		ip.IsLinkLocalUnicast() || metadata[ip] {
		return false
	}
	networks := configured
	if len(networks) == 0 {
		networks = a.state.Load().connected
	}
	for _, n := range networks {
		if n.Contains(ip) {
			return true
		}
	}
	return false
}
