package agent

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/cni/netns"
)

// backlog of the agent's listeners. The kernel cuts it to net.core.somaxconn.
const backlog = 4096

// listeners are the agent's listening sockets inside one scope, as
// descriptors. Those for captured traffic are on loopback only: the hooks lead
// to them wherever they are bound, and from the network nobody can dial them.
type listeners struct {
	outbound, inbound, tunnel []int
}

// A listenControl sets what a capture back end needs on a socket before it is bound.
type listenControl func(port int, family int, fd int) error

// openListeners opens the three ports in both families. A namespace without
// IPv6 gets those of IPv4 only. On error nothing stays open.
func openListeners(ns *netns.Handle, control listenControl) (_ *listeners, err error) {
	l := &listeners{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		loopback, anywhere := netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv4Unspecified()
		if family == unix.AF_INET6 {
			loopback, anywhere = netip.IPv6Loopback(), netip.IPv6Unspecified()
		}
		for _, want := range []struct {
			fds  *[]int
			ip   netip.Addr
			port uint16
		}{
			{&l.outbound, loopback, capture.OutboundPort},
			{&l.inbound, loopback, capture.InboundPort},
			{&l.tunnel, anywhere, capture.TunnelPort},
		} {
			fd, err := listen(ns, family, netip.AddrPortFrom(want.ip, want.port), control)
			if family == unix.AF_INET6 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
				break // no IPv6 in this namespace
			}
			if errors.Is(err, unix.EADDRINUSE) {
				return nil, fmt.Errorf("port %d is taken by another program (see `ss -ltnp`): %w", want.port, err)
			}
			if err != nil {
				return nil, err
			}
			*want.fds = append(*want.fds, fd)
		}
	}
	return l, nil
}

func listen(ns *netns.Handle, family int, at netip.AddrPort, control listenControl) (int, error) {
	// IPPROTO_TCP, said outright: an MPTCP listener cannot be the target of a socket lookup.
	fd, err := ns.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return -1, fmt.Errorf("listen on %s: %w", at, err)
	}
	if err := bindListener(fd, family, at, control); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("listen on %s: %w", at, err)
	}
	return fd, nil
}

func bindListener(fd, family int, at netip.AddrPort, control listenControl) error {
	// Without SO_REUSEPORT nobody can join the port; SO_REUSEADDR only lets us
	// return while old connections are in TIME_WAIT.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
	}
	if control != nil {
		if err := control(int(at.Port()), family, fd); err != nil {
			return err
		}
	}
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		return err
	}
	return unix.Listen(fd, backlog)
}

// stop makes the sockets refuse, in every copy of their descriptors, which stay
// valid for whoever holds them until close. A socket that merely nobody accepts
// from would go on answering: its clients would wait for as long as it lives.
func (l *listeners) stop() {
	for _, fds := range [][]int{l.outbound, l.inbound, l.tunnel} {
		for _, fd := range fds {
			_ = unix.Shutdown(fd, unix.SHUT_RDWR) // inet_shutdown: leaves TCP_LISTEN
		}
	}
}

func (l *listeners) close() {
	for _, fds := range [][]int{l.outbound, l.inbound, l.tunnel} {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	*l = listeners{}
}

// agentPort reports whether p is one of the agent's ports in a scope.
func agentPort(p uint16) bool {
	return p == capture.OutboundPort || p == capture.InboundPort || p == capture.TunnelPort
}
