package attest

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
	"ringfence.dev/test/nettest"
)

func itoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

func (l *lab) owner(a *Attestor, addr string) (string, error) {
	id, err := a.Owner(context.Background(), l.net, netip.MustParseAddrPort(addr))
	return strings.TrimPrefix(id.ID.Path(), "/ns/a/sa/"), err
}

func (l *lab) wantOwner(a *Attestor, addr, want string) {
	l.t.Helper()
	if got, err := l.owner(a, addr); err != nil || got != want {
		l.t.Errorf("owner of %s: %q (%v), want %q", addr, got, err, want)
	}
}

func (l *lab) wantNoOwner(a *Attestor, addr string, want error) {
	l.t.Helper()
	if got, err := l.owner(a, addr); !errors.Is(err, want) {
		l.t.Errorf("owner of %s: %q (%v), want %v", addr, got, err, want)
	}
}

func TestOwner(t *testing.T) {
	l := newLab(t)
	prog := l.program("server")
	a := l.attestor(nil)
	l.ready("one.service", prog, nil, "play:listen", "127.0.0.1:80")
	l.ready("two.service", prog, nil, "play:listen", "[::]:81") // dual-stack, MPTCP as Go does by default
	l.ready("", prog, nil, "play:listen", "[::1]:82")
	for range 2 { // found, then cached
		l.wantOwner(a, "127.0.0.1:80", "one")
		l.wantOwner(a, "[::ffff:127.0.0.1]:80", "one")
		l.wantOwner(a, "0.0.0.0:80", "one") // any on the port
		l.wantOwner(a, "127.0.0.1:81", "two")
		l.wantOwner(a, "[::1]:81", "two")
		l.wantOwner(a, "[::1]:82", "server")
		l.wantNoOwner(a, "127.0.0.2:80", workload.ErrUnknown)
		l.wantNoOwner(a, "127.0.0.1:82", workload.ErrUnknown)
		l.wantNoOwner(a, "127.0.0.1:83", workload.ErrUnknown)
		l.wantNoOwner(a, "127.0.0.1:0", workload.ErrUnknown)
	}
}

// The cache follows the listening socket.
func TestOwnerChanges(t *testing.T) {
	l := newLab(t)
	prog := l.program("server")
	a := l.attestor(nil)
	first := l.ready("one.service", prog, nil, "play:listen", "127.0.0.1:80")
	l.wantOwner(a, "127.0.0.1:80", "one")
	first.stop()
	l.wantNoOwner(a, "127.0.0.1:80", workload.ErrUnknown)
	l.ready("two.service", prog, nil, "play:listen", "127.0.0.1:80")
	l.wantOwner(a, "127.0.0.1:80", "two")
}

// listen makes a listening socket in the lab, to be handed to programs.
func (l *lab) listen(addr string, control func(fd int) error) *os.File {
	l.t.Helper()
	ap := netip.MustParseAddrPort(addr)
	fd, err := l.net.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), addr)
	if control != nil {
		err = control(fd)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()})
	}
	if err == nil {
		err = unix.Listen(fd, 5)
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { f.Close() })
	return f
}

// Workers that inherited one socket agree, whatever their number, and others do not.
func TestForkedWorkersAndStrangers(t *testing.T) {
	l := newLab(t)
	prog, other := l.program("server"), l.program("other")
	a := l.attestor(nil)
	f := l.listen("127.0.0.1:80", nil)
	for range 3 {
		l.ready("web.service", prog, []*os.File{f}, "play:wait")
	}
	f.Close() // the test itself holds it no more
	l.wantOwner(a, "127.0.0.1:80", "web")

	g := l.listen("127.0.0.1:81", nil)
	l.ready("web.service", prog, []*os.File{g}, "play:wait")
	stranger := l.ready("", other, []*os.File{g}, "play:wait")
	g.Close()
	l.wantNoOwner(a, "127.0.0.1:81", workload.ErrAmbiguous)
	_, err := l.owner(a, "127.0.0.1:81")
	if err == nil || !strings.Contains(err.Error(), "/sa/web") || !strings.Contains(err.Error(), "/sa/other") {
		t.Errorf("%v does not name both", err)
	}
	stranger.stop()
	nettest.Wait(t, "the stranger's leaving to count", func() bool {
		got, err := l.owner(a, "127.0.0.1:81")
		return err == nil && got == "web"
	})
}

// A member that joins a SO_REUSEPORT group of another service would get part of
// its connections: from then on the port has no owner.
func TestReusePortIntruder(t *testing.T) {
	l := newLab(t)
	prog := l.program("server")
	a := l.attestor(nil)
	reuse := func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }
	join := func(unit string) {
		f := l.listen("127.0.0.1:80", reuse)
		l.ready(unit, prog, []*os.File{f}, "play:wait")
		f.Close()
	}
	join("web.service")
	join("web.service")
	l.wantOwner(a, "127.0.0.1:80", "web")
	join("evil.service")
	l.wantNoOwner(a, "127.0.0.1:80", workload.ErrAmbiguous)
}

// A socket without a process, and one of a process that nothing names.
func TestOwnerWithoutName(t *testing.T) {
	l := newLab(t)
	a := l.attestor(nil)
	l.listen("127.0.0.1:80", nil) // held by this test, which runs from a temporary directory
	l.wantNoOwner(a, "127.0.0.1:80", workload.ErrUnknown)
}

func TestSole(t *testing.T) {
	l := newLab(t)
	prog := l.program("server")
	a := l.attestor(nil)
	ctx := context.Background()
	if id, err := a.Sole(ctx, l.net); !errors.Is(err, workload.ErrUnknown) {
		t.Errorf("nobody listens, yet %s (%v)", id.ID, err)
	}
	l.listen("127.0.0.1:15001", nil) // our own, as an agent's
	l.ready("one.service", prog, nil, "play:listen", "127.0.0.1:80")
	l.ready("one.service", prog, nil, "play:listen", "[::]:81")
	if id, err := a.Sole(ctx, l.net); err != nil || id.Name != "one" {
		t.Errorf("%s (%v)", id.ID, err)
	}
	l.ready("two.service", prog, nil, "play:listen", "127.0.0.1:82")
	if id, err := a.Sole(ctx, l.net); !errors.Is(err, workload.ErrAmbiguous) {
		t.Errorf("two listen, yet %s (%v)", id.ID, err)
	}
}

func TestForgetLetsGoOfTheNamespace(t *testing.T) {
	l := newLab(t)
	a := l.attestor(nil)
	l.ready("one.service", l.program("server"), nil, "play:listen", "127.0.0.1:80")
	l.wantOwner(a, "127.0.0.1:80", "one")
	if a.conns.size() != 1 || a.owners.size() != 1 {
		t.Errorf("%d sockets, %d owners", a.conns.size(), a.owners.size())
	}
	a.Forget(l.net)
	if a.conns.size() != 0 || a.owners.size() != 0 {
		t.Errorf("after Forget: %d sockets, %d owners", a.conns.size(), a.owners.size())
	}
	l.wantOwner(a, "127.0.0.1:80", "one")
	a.Close()
	a.Close()
}

func TestOpener(t *testing.T) {
	l := newLab(t)
	a := l.attestor(nil)
	l.listen("127.0.0.1:80", nil)
	p := l.start("web.service", l.program("client"), nil, "play:dial", "127.0.0.1:80")
	local := netip.MustParseAddrPort(p.line())
	remote := netip.MustParseAddrPort("127.0.0.1:80")
	ctx := context.Background()
	ev, err := a.Opener(ctx, l.net, local, remote, 0)
	if err != nil {
		t.Fatal(err)
	}
	if ev.PID != p.pid() || ev.Source != workload.SourceSockDiag || ev.UID != 0 || ev.CgroupID == 0 {
		t.Errorf("evidence %+v", ev)
	}
	if id, err := a.Identify(ctx, ev); err != nil || id.Name != "web" {
		t.Errorf("%s (%v)", id.ID, err)
	}
	if _, err := a.Opener(ctx, l.net, local, netip.MustParseAddrPort("127.0.0.1:81"), 0); !errors.Is(err, workload.ErrGone) {
		t.Errorf("a connection that is not: %v", err)
	}
	p.stop()
	if ev, err := a.Opener(ctx, l.net, local, remote, 0); !errors.Is(err, workload.ErrGone) {
		t.Errorf("after its end: %+v (%v)", ev, err)
	}
}

// Which sockets may take a connection, case by case.
func TestTaking(t *testing.T) {
	s := func(family uint8, addr string, device uint32, v6only bool) sockdiag.Socket {
		return sockdiag.Socket{Family: family, Source: netip.MustParseAddrPort(addr), Device: device, V6Only: v6only}
	}
	any4, any6, only6 := s(unix.AF_INET, "0.0.0.0:80", 0, false), s(unix.AF_INET6, "[::]:80", 0, false), s(unix.AF_INET6, "[::]:80", 0, true)
	exact, bound := s(unix.AF_INET, "192.0.2.1:80", 0, false), s(unix.AF_INET, "192.0.2.1:80", 3, false)
	mapped := s(unix.AF_INET6, "0.0.0.0:80", 0, false) // [::ffff:0.0.0.0]:80
	for name, c := range map[string]struct {
		have []sockdiag.Socket
		ip   string
		want int
	}{
		"exact before wildcard":    {[]sockdiag.Socket{any4, any6, exact}, "192.0.2.1", 1},
		"bound leaves it open":     {[]sockdiag.Socket{any4, bound}, "192.0.2.1", 2},
		"exact settles bound":      {[]sockdiag.Socket{any4, bound, exact}, "192.0.2.1", 2},
		"other address":            {[]sockdiag.Socket{exact}, "192.0.2.2", 0},
		"wildcard of v4":           {[]sockdiag.Socket{any4}, "192.0.2.2", 1},
		"wildcard of v4 for v6":    {[]sockdiag.Socket{any4}, "2001:db8::1", 0},
		"dual stack":               {[]sockdiag.Socket{any6}, "192.0.2.2", 1},
		"v6 only":                  {[]sockdiag.Socket{only6}, "192.0.2.2", 0},
		"v6 only for v6":           {[]sockdiag.Socket{only6}, "2001:db8::1", 1},
		"mapped wildcard":          {[]sockdiag.Socket{mapped}, "192.0.2.2", 1},
		"mapped wildcard for v6":   {[]sockdiag.Socket{mapped}, "2001:db8::1", 0},
		"unspecified asks for all": {[]sockdiag.Socket{any4, exact, only6}, "0.0.0.0", 3},
	} {
		if got := taking(c.have, netip.MustParseAddr(c.ip)); len(got) != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// While only process 1 holds a socket, its socket unit says whose it is.
func TestActivated(t *testing.T) {
	h := newHost(t)
	h.process(1, "/usr/lib/systemd/systemd", "0::/init.scope\n")
	h.file("usr/lib/systemd/systemd", "ELF")
	h.file("usr/lib/systemd/system/ssh.socket", "[Unit]\n[Socket]\nListenStream=0.0.0.0:22\nListenStream=[::]:22\nAccept=no\n")
	h.file("etc/systemd/system/sshd.socket", "-> /usr/lib/systemd/system/ssh.socket")
	h.file("usr/lib/systemd/system/app.socket", "[Socket]\nListenStream=/run/app.sock\nListenStream=8080\nService=backend.service\n")
	h.file("usr/lib/systemd/system/moved.socket", "[Socket]\nListenStream=99\n")
	h.file("etc/systemd/system/moved.socket.d/port.conf", "[Socket]\nListenStream=\nListenStream=127.0.0.1:100\n[Install]\nListenStream=101\n")
	h.file("usr/lib/systemd/system/each.socket", "[Socket]\nListenStream=7\nAccept=yes\n")
	h.file("usr/lib/systemd/system/masked.socket", "[Socket]\nListenStream=8081\n")
	h.file("etc/systemd/system/masked.socket", "-> ../../../../../../../../../../dev/null")
	h.file("usr/lib/systemd/system/a.socket", "[Socket]\nListenStream=5000\n")
	h.file("usr/lib/systemd/system/b.socket", "[Socket]\nListenStream=5000\n")
	cfg := h.config()
	cfg.Entries = []Entry{{"spiffe://lab.test/backend", []string{"systemd:id:backend.service"}}}
	a := h.attestor(cfg)
	for addr, want := range map[string]string{
		"192.0.2.1:22": "ssh", "[2001:db8::1]:22": "ssh", "192.0.2.1:8080": "/backend", "127.0.0.1:100": "moved",
		"192.0.2.1:7": "each_-40", "192.0.2.1:99": "systemd", "192.0.2.1:101": "systemd", "192.0.2.1:8081": "systemd", "192.0.2.1:100": "systemd",
	} {
		id, err := a.activated(context.Background(), holderOf(1), netip.MustParseAddrPort(addr))
		if os.Geteuid() != 0 && want == "systemd" {
			continue // its executable must belong to root
		}
		if got := strings.TrimPrefix(id.ID.Path(), "/ns/a/sa/"); err != nil || got != want {
			t.Errorf("%s: %q (%v), want %q", addr, got, err, want)
		}
	}
	if id, err := a.activated(context.Background(), holderOf(1), netip.MustParseAddrPort("192.0.2.1:5000")); !errors.Is(err, workload.ErrAmbiguous) {
		t.Errorf("two socket units: %s (%v)", id.ID, err)
	}
}

func holderOf(pid uint32) (h proc.Holder) {
	h.PID = pid
	return h
}

func BenchmarkOwner(b *testing.B) {
	l := newLab(b)
	a := l.attestor(nil)
	l.ready("one.service", l.program("server"), nil, "play:listen", "127.0.0.1:80")
	addr := netip.MustParseAddrPort("127.0.0.1:80")
	run := func(name string, before func()) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				before()
				if _, err := a.Owner(context.Background(), l.net, addr); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("cached", func() {})
	run("cold", func() { a.Forget(l.net) })
}

// While the kernel's count of listener changes stays, nobody is asked again; the
// moment it moves, what was known counts for nothing.
func TestOwnerIsBelievedWhileListenersStay(t *testing.T) {
	l := newLab(t)
	prog := l.program("server")
	var listens uint64
	a := l.attestor(func(c *Config) { c.Listens = func() uint64 { return listens } })
	a.quietFor = time.Hour
	first := l.ready("one.service", prog, nil, "play:listen", "127.0.0.1:80")
	l.wantOwner(a, "127.0.0.1:80", "one")
	first.stop()
	l.ready("two.service", prog, nil, "play:listen", "127.0.0.1:80")
	l.wantOwner(a, "127.0.0.1:80", "one") // the count has not been told
	listens++
	l.wantOwner(a, "127.0.0.1:80", "two")
}
