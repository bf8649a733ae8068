package proxy_test

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/proxy"
	"ringfence.dev/proxy/socket"
	"ringfence.dev/proxy/tunnel"
)

// silentListener listens on the tunnel's port with the smallest queue, and never accepts.
func silentListener(t *testing.T, ip netip.Addr) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: ip.As4(), Port: tunnel.Port}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	addr, err := socket.LocalAddr(fd)
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

func tunePeers(n int) func(*proxy.Config) {
	return func(c *proxy.Config) { c.MaxPeers = n }
}

func tuneConnections(n int) func(*proxy.Config) {
	return func(c *proxy.Config) { c.MaxConnections = n }
}
