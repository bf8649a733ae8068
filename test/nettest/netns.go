package nettest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is a scratch network namespace with loopback up. Its name works with
// "ip netns exec".
type NS struct {
	Name string // unique on this machine
	Path string // under /run/netns, where the namespace is mounted

	handle netns.NsHandle
}

// NetNS makes a network namespace whose name begins with name, with lo up. It
// needs root (see [RequireRoot]) and is removed at the end of the test.
func NetNS(t testing.TB, name string) *NS {
	t.Helper()
	RequireRoot(t)
	ns := &NS{Name: unique(name)}
	ns.Path = "/run/netns/" + ns.Name
	if err := ns.create(); err != nil {
		t.Fatalf("make network namespace %s: %v", ns.Name, err)
	}
	t.Cleanup(func() {
		ns.handle.Close()
		if err := netns.DeleteNamed(ns.Name); err != nil {
			t.Errorf("remove network namespace %s: %v", ns.Name, err)
		}
	})
	nl := ns.netlink(t)
	defer nl.Close()
	if err := setUp(nl, "lo"); err != nil {
		t.Fatalf("network namespace %s: %v", ns.Name, err)
	}
	return ns
}

// Do runs fn on a thread that has entered the namespace. Sockets that fn opens
// and processes that it starts stay there. It must not call t.FailNow.
func (ns *NS) Do(fn func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns.handle); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", ns.Name, err)
		}
		return fn()
	})
}

// Listen listens on a TCP address inside the namespace until the test ends.
func (ns *NS) Listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatalf("listen on %s in %s: %v", addr, ns.Name, err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// Exec runs a program inside the namespace and returns what it printed on both
// streams. A failing program fails the test.
func (ns *NS) Exec(t testing.TB, name string, args ...string) string {
	t.Helper()
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s %v in %s: %v\n%s", name, args, ns.Name, err, out)
	}
	return string(out)
}

// VethPair joins two namespaces by a veth pair and returns the names of its
// ends. addrs are in CIDR form and go to a and b in turn: a's, b's, a's, b's.
// The addresses are usable at once: IPv6 duplicate address detection is off.
func VethPair(t testing.TB, a, b *NS, addrs ...string) (devA, devB string) {
	t.Helper()
	n := serial.Add(1)
	devA, devB = fmt.Sprintf("veth%da", n), fmt.Sprintf("veth%db", n)
	ha, hb := a.netlink(t), b.netlink(t)
	defer ha.Close()
	defer hb.Close()
	pair := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: devB, PeerNamespace: netlink.NsFd(b.handle)}
	pair.Name = devA
	if err := ha.LinkAdd(pair); err != nil {
		t.Fatalf("veth pair between %s and %s: %v", a.Name, b.Name, err)
	}
	for i, cidr := range addrs {
		h, dev := ha, devA
		if i%2 == 1 {
			h, dev = hb, devB
		}
		if err := addAddr(h, dev, cidr); err != nil {
			t.Fatalf("address %s on %s: %v", cidr, dev, err)
		}
	}
	if err := setUp(ha, devA); err != nil {
		t.Fatal(err)
	}
	if err := setUp(hb, devB); err != nil {
		t.Fatal(err)
	}
	// Carrier follows a moment after both ends are up, and IPv6 sends nothing before.
	Wait(t, "carrier on "+devA+" and "+devB, func() bool { return running(ha, devA) && running(hb, devB) })
	return devA, devB
}

func (ns *NS) netlink(t testing.TB) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandleAt(ns.handle, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatalf("netlink in %s: %v", ns.Name, err)
	}
	return h
}

func (ns *NS) create() error {
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return err
	}
	return onThread(func() (err error) {
		ns.handle, err = netns.NewNamed(ns.Name)
		return err
	})
}

// onThread runs fn, which changes the thread's network namespace, on a thread of
// its own. The thread comes home even though it could as well end: it may be
// the main thread, which cannot, and whose namespace /proc/self shows.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := fmt.Errorf("ended early")
		defer func() { done <- err }()
		runtime.LockOSThread()
		home, herr := netns.Get()
		if herr != nil {
			runtime.UnlockOSThread()
			err = herr
			return
		}
		defer home.Close()
		defer func() {
			if netns.Set(home) == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = fn()
	}()
	return <-done
}

func setUp(h *netlink.Handle, dev string) error {
	link, err := h.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("find %s: %w", dev, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", dev, err)
	}
	return nil
}

func running(h *netlink.Handle, dev string) bool {
	link, err := h.LinkByName(dev)
	return err == nil && link.Attrs().RawFlags&unix.IFF_RUNNING != 0
}

func addAddr(h *netlink.Handle, dev, cidr string) error {
	link, err := h.LinkByName(dev)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	addr.Flags |= unix.IFA_F_NODAD
	return h.AddrAdd(link, addr)
}
