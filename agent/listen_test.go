package agent

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture/iptables"
	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

func handleOf(t *testing.T, ns *nettest.NS) *netns.Handle {
	t.Helper()
	h, err := netns.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	// The first socket ever made elsewhere opens the way home, for good.
	fd, err := h.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	return h
}

// fds counts this process's descriptors.
func fds(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestListeners(t *testing.T) {
	ns := nettest.NetNS(t, "listen")
	h := handleOf(t, ns)
	before := fds(t)
	l, err := openListeners(h, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(l.outbound) != 2 || len(l.inbound) != 2 || len(l.tunnel) != 2 {
		t.Errorf("%+v", l)
	}
	out := ns.Exec(t, "ss", "-Hltn")
	for _, want := range []string{"127.0.0.1:15001", "[::1]:15001", "127.0.0.1:15006", "[::1]:15006", "0.0.0.0:15008", "[::]:15008"} {
		if !strings.Contains(out, want) {
			t.Errorf("nothing listens on %s:\n%s", want, out)
		}
	}
	// Nobody joins a port of the agent's, not even with SO_REUSEPORT.
	if _, err := openListeners(h, nil); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("second set of listeners: %v", err)
	}
	l.close()
	l.close() // twice is no harm
	if after := fds(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// A clash names the port, and what was opened before it is closed again.
func TestListenersClash(t *testing.T) {
	for _, at := range []string{"127.0.0.1:15001", "[::1]:15006", "0.0.0.0:15008", "[::]:15008"} {
		ns := nettest.NetNS(t, "clash")
		h := handleOf(t, ns)
		taken := ns.Listen(t, at)
		before := fds(t)
		_, err := openListeners(h, nil)
		port := at[strings.LastIndexByte(at, ':')+1:]
		if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "port "+port+" is taken") {
			t.Errorf("%s taken: %v", at, err)
		}
		if after := fds(t); after != before {
			t.Errorf("%s taken: %d descriptors, %d before", at, after, before)
		}
		taken.Close()
		if out := ns.Exec(t, "ss", "-Hltn"); strings.Contains(out, ":150") {
			t.Errorf("%s taken: left listening\n%s", at, out)
		}
	}
}

func TestListenersWithoutIPv6(t *testing.T) {
	ns := nettest.NetNS(t, "listen4")
	ns.Exec(t, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
	h := handleOf(t, ns)
	before := fds(t)
	l, err := openListeners(h, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(l.outbound) != 1 || len(l.inbound) != 1 {
		t.Errorf("%+v", l)
	}
	l.close()
	if after := fds(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// What a back end cannot set on a socket ends the whole set.
func TestListenControl(t *testing.T) {
	ns := nettest.NetNS(t, "control")
	h := handleOf(t, ns)
	before := fds(t)
	refusal := errors.New("not this one")
	calls := 0
	_, err := openListeners(h, func(port, family, fd int) error {
		if calls++; calls == 5 {
			return refusal
		}
		return nil
	})
	if !errors.Is(err, refusal) || fds(t) != before {
		t.Errorf("%v, %d descriptors, %d before", err, fds(t), before)
	}
	l, err := openListeners(h, iptables.ListenControl)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if v, err := unix.GetsockoptInt(l.inbound[0], unix.SOL_IP, unix.IP_TRANSPARENT); err != nil || v != 1 {
		t.Errorf("IP_TRANSPARENT is %d, %v", v, err)
	}
}
