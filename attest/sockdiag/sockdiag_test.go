package sockdiag_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

func open(t testing.TB) (*nettest.NS, *sockdiag.Conn) {
	t.Helper()
	ns := nettest.NetNS(t, "rf-sockdiag")
	h, err := netns.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	c, err := sockdiag.Open(h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return ns, c
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

// ids are what the test itself knows of one of its sockets.
func ids(t *testing.T, c syscall.Conn) (ino, cookie uint64) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := raw.Control(func(fd uintptr) {
		if unix.Fstat(int(fd), &st) == nil {
			cookie, _ = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
		}
	}); err != nil {
		t.Fatal(err)
	}
	return st.Ino, cookie
}

// listen listens in the namespace; mptcp as Go does by default.
func listen(t *testing.T, ns *nettest.NS, network, addr string, mptcp bool) net.Listener {
	t.Helper()
	var l net.Listener
	err := ns.Do(func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(mptcp)
		l, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func dial(t *testing.T, ns *nettest.NS, addr string) *net.TCPConn {
	t.Helper()
	var c net.Conn
	if err := ns.Do(func() (err error) {
		c, err = net.Dial("tcp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func TestListeners(t *testing.T) {
	ns, c := open(t)
	ctx := context.Background()
	if got, err := c.Listeners(ctx); err != nil || len(got) != 0 {
		t.Fatalf("a fresh namespace has listeners %v (%v)", got, err)
	}
	for _, tt := range []struct {
		network, addr, source string
		family                uint8
		v6only, mptcp         bool
	}{
		{"tcp4", "127.0.0.1:8001", "127.0.0.1:8001", unix.AF_INET, false, false},
		{"tcp4", "0.0.0.0:8002", "0.0.0.0:8002", unix.AF_INET, false, false},
		{"tcp", ":8003", "[::]:8003", unix.AF_INET6, false, false},
		{"tcp6", "[::]:8004", "[::]:8004", unix.AF_INET6, true, false},
		{"tcp6", "[::1]:8005", "[::1]:8005", unix.AF_INET6, true, false},
		{"tcp4", "127.0.0.1:8006", "127.0.0.1:8006", unix.AF_INET, false, true},
	} {
		l := listen(t, ns, tt.network, tt.addr, tt.mptcp)
		ino, _ := ids(t, l.(*net.TCPListener))
		got, err := c.ListenersOn(ctx, addrPort(l.Addr()).Port())
		if err != nil || len(got) != 1 {
			t.Fatalf("%s %s: %v (%v)", tt.network, tt.addr, got, err)
		}
		s := got[0]
		if s.Inode != ino || s.Source.String() != tt.source || s.Family != tt.family || s.V6Only != tt.v6only || s.State != sockdiag.Listen {
			t.Errorf("%s %s (inode %d): %+v", tt.network, tt.addr, ino, s)
		}
	}
	all, err := c.Listeners(ctx)
	if err != nil || len(all) != 6 {
		t.Errorf("%d listeners (%v), want 6", len(all), err)
	}
	if got, err := c.ListenersOn(ctx, 8000); err != nil || len(got) != 0 {
		t.Errorf("port 8000: %v (%v)", got, err)
	}
	if _, err := c.ListenersOn(ctx, 0); err == nil {
		t.Error("port 0 accepted")
	}
}

func TestFind(t *testing.T) {
	ns, c := open(t)
	ctx := context.Background()
	for _, addr := range []string{"127.0.0.1:8001", "[::1]:8001"} {
		listen(t, ns, "tcp", addr, false)
		conn := dial(t, ns, addr)
		local, remote := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
		ino, cookie := ids(t, conn)
		s, err := c.Find(ctx, local, remote, 0)
		if err != nil || s.Inode != ino || s.Cookie != cookie || s.State != sockdiag.Established || s.UID != 0 {
			t.Errorf("%s: %+v (%v), want inode %d, cookie %d", addr, s, err, ino, cookie)
		}
		if s.CgroupID == 0 {
			t.Errorf("%s: this kernel tells no cgroup id", addr)
		}
		// Asked in its mapped form, an IPv4 address is the same.
		mapped := netip.AddrPortFrom(netip.AddrFrom16(local.Addr().As16()), local.Port())
		if s, err := c.Find(ctx, mapped, remote, 0); err != nil || s.Inode != ino {
			t.Errorf("%s mapped: %+v (%v)", addr, s, err)
		}
		// A listener on the port is no connection.
		other := netip.AddrPortFrom(local.Addr(), local.Port()^1)
		if s, err := c.Find(ctx, remote, other, 0); !errors.Is(err, sockdiag.ErrNotFound) {
			t.Errorf("%s: found %+v (%v) for a connection that is not", addr, s, err)
		}
		if s, err := c.Find(ctx, other, remote, 0); !errors.Is(err, sockdiag.ErrNotFound) {
			t.Errorf("%s: found %+v (%v) for nobody", addr, s, err)
		}
	}
	got, err := c.Connections(ctx)
	if err != nil || len(got) != 4 {
		t.Errorf("%d connected sockets (%v), want both ends of 2", len(got), err)
	}
}

func TestFindDualStackSocket(t *testing.T) {
	ns, c := open(t)
	l := listen(t, ns, "tcp", ":8001", false)
	conn := dial(t, ns, "127.0.0.1:8001")
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	ino, _ := ids(t, served.(*net.TCPConn))
	s, err := c.Find(context.Background(), addrPort(conn.RemoteAddr()), addrPort(conn.LocalAddr()), 0)
	if err != nil || s.Inode != ino || s.Family != unix.AF_INET6 || !s.Source.Addr().Is4() {
		t.Errorf("%+v (%v), want inode %d", s, err, ino)
	}
}

func TestDestroy(t *testing.T) {
	ns, c := open(t)
	ctx := context.Background()
	l := listen(t, ns, "tcp", "127.0.0.1:8001", false)
	conn := dial(t, ns, "127.0.0.1:8001")
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	s, err := c.Find(ctx, addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr()), 0)
	if err != nil {
		t.Fatal(err)
	}
	wrong := s
	wrong.Cookie ^= 1
	if err := c.Destroy(ctx, wrong); !errors.Is(err, sockdiag.ErrNotFound) {
		t.Errorf("destroyed by a wrong cookie: %v", err)
	}
	err = c.Destroy(ctx, s)
	if errors.Is(err, sockdiag.ErrNotSupported) {
		t.Fatalf("kernel lacks CONFIG_INET_DIAG_DESTROY: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("owner's read: %v", err)
	}
	if _, err := served.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) && err != io.EOF {
		t.Errorf("peer's read: %v", err)
	}
	if err := c.Destroy(ctx, s); !errors.Is(err, sockdiag.ErrNotFound) {
		t.Errorf("destroyed twice: %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	ns, c := open(t)
	l := listen(t, ns, "tcp", ":8001", false)
	ino, _ := ids(t, l.(*net.TCPListener))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				got, err := c.ListenersOn(context.Background(), 8001)
				if err != nil || len(got) != 1 || got[0].Inode != ino {
					t.Errorf("%v (%v)", got, err)
					return
				}
			}
		})
	}
	wg.Wait()
	c.Close()
	c.Close()
	if _, err := c.Listeners(context.Background()); !errors.Is(err, sockdiag.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// A dump longer than one message comes whole.
func TestLongDump(t *testing.T) {
	ns, c := open(t)
	const n = 600
	var want []uint16
	for range n {
		l := listen(t, ns, "tcp4", "127.0.0.1:0", false)
		want = append(want, addrPort(l.Addr()).Port())
	}
	got, err := c.Listeners(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	ports := make([]uint16, 0, n)
	for _, s := range got {
		ports = append(ports, s.Source.Port())
	}
	slices.Sort(ports)
	slices.Sort(want)
	if !slices.Equal(ports, want) {
		t.Errorf("%d ports, want %d", len(ports), len(want))
	}
}

func BenchmarkListenersOn(b *testing.B) {
	_, c := open(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.ListenersOn(context.Background(), 8001); err != nil {
			b.Fatal(err)
		}
	}
}
