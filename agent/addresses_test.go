package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"

	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

func addressesOf(t *testing.T, ns *nettest.NS) *addresses {
	t.Helper()
	h, err := netns.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	a, err := newAddresses(h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestAddresses(t *testing.T) {
	ns, other := nettest.NetNS(t, "addr"), nettest.NetNS(t, "addrpeer")
	nettest.VethPair(t, ns, other, "192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "2001:db8::2/64")
	ns.Exec(t, "ip", "addr", "add", "10.9.9.9/32", "dev", "lo")
	a := addressesOf(t, ns)
	for _, c := range []struct {
		ip          string
		local, mesh bool
	}{
		{"192.0.2.1", true, true},
		{"192.0.2.2", false, true},
		{"192.0.2.77", false, true},
		{"192.0.3.1", false, false},
		{"2001:db8::1", true, true},
		{"2001:db8::2", false, true},
		{"2001:db9::2", false, false},
		{"10.9.9.9", true, false}, // alone in its network
		{"127.0.0.1", true, false},
		{"127.9.9.9", true, false},
		{"::1", true, false},
		{"0.0.0.0", true, false},
		{"::", true, false},
		{"224.0.0.1", false, false},
		{"ff02::1", false, false},
		{"fe80::1", false, false},
		{"169.254.7.7", false, false},
	} {
		if got := a.isLocal(ip(c.ip)); got != c.local {
			t.Errorf("isLocal(%s) = %v", c.ip, got)
		}
		if got := a.inMesh(ip(c.ip), nil); got != c.mesh {
			t.Errorf("inMesh(%s) = %v", c.ip, got)
		}
	}
	if a.inMesh(netip.Addr{}, nil) {
		t.Error("no address is in the mesh")
	}
	s := a.state.Load()
	if !s.loUp || !s.has6 || s.primary4 != ip("192.0.2.1") && s.primary4 != ip("10.9.9.9") || s.primary6 != ip("2001:db8::1") {
		t.Errorf("%+v", s)
	}
}

// Networks in the settings replace the connected ones, and nothing makes a
// metadata service a peer.
func TestMeshNetworks(t *testing.T) {
	ns := nettest.NetNS(t, "mesh")
	a := addressesOf(t, ns)
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	for _, c := range []struct {
		ip   string
		want bool
	}{
		{"8.8.8.8", true}, {"2001:db8::9", true},
		{"169.254.169.254", false}, {"fd00:ec2::254", false}, {"fd20:ce::254", false},
		{"100.100.100.200", false}, {"168.63.129.16", false},
		{"127.0.0.1", false}, {"fe80::1", false}, {"224.0.0.1", false},
	} {
		if got := a.inMesh(ip(c.ip), all); got != c.want {
			t.Errorf("inMesh(%s) = %v", c.ip, got)
		}
	}
	if a.inMesh(ip("192.0.2.1"), nil) {
		t.Error("a namespace without networks has no neighbours")
	}
}

// An address that comes or goes counts as soon as netlink has told.
func TestAddressesAreFollowed(t *testing.T) {
	ns := nettest.NetNS(t, "follow")
	a := addressesOf(t, ns)
	ctx, cancel := context.WithCancel(context.Background())
	changed := make(chan struct{}, 100)
	done := make(chan error, 1)
	go func() {
		done <- a.run(ctx, slog.New(slog.DiscardHandler), func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
	}()
	if a.isLocal(ip("192.0.2.9")) || a.state.Load().has6 {
		t.Fatal("not yet")
	}
	ns.Exec(t, "ip", "addr", "add", "192.0.2.9/24", "dev", "lo")
	nettest.Wait(t, "the new address", func() bool { return a.isLocal(ip("192.0.2.9")) && a.inMesh(ip("192.0.2.10"), nil) })
	<-changed
	ns.Exec(t, "ip", "addr", "add", "2001:db8::9/64", "dev", "lo", "nodad")
	nettest.Wait(t, "IPv6", func() bool { return a.state.Load().has6 })
	ns.Exec(t, "ip", "addr", "del", "192.0.2.9/24", "dev", "lo")
	nettest.Wait(t, "the address to go", func() bool { return !a.isLocal(ip("192.0.2.9")) })
	ns.Exec(t, "ip", "link", "set", "lo", "down")
	nettest.Wait(t, "lo down", func() bool { return !a.state.Load().loUp })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
	a.Close() // twice is no harm
}

// A namespace in which IPv6 is switched off has none, and everything else works.
func TestAddressesWithoutIPv6(t *testing.T) {
	ns := nettest.NetNS(t, "no6")
	ns.Exec(t, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
	ns.Exec(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "lo")
	a := addressesOf(t, ns)
	if s := a.state.Load(); s.has6 || s.primary6.IsValid() || s.primary4 != ip("192.0.2.1") {
		t.Errorf("%+v", s)
	}
}
