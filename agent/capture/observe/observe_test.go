package observe

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/cni/netns"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

func TestMain(m *testing.M) {
	// One thread that opens sockets lives as long as the process.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("ringfence.dev/cni/netns.(*openerThread).start.func1"))
}

// watched is a scratch namespace under observation.
func watched(t *testing.T, loopback capture.Loopback) (*Backend, *nettest.NS) {
	t.Helper()
	ns := nettest.NetNS(t, "rf-test-obs")
	h, err := netns.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	b := New()
	t.Cleanup(func() { b.Close(true) })
	if err := b.Add(t.Context(), capture.Scope{Name: "s", NS: h, Loopback: loopback}); err != nil {
		t.Fatal(err)
	}
	return b, ns
}

func sample(t *testing.T, b *Backend) (events []capture.Event) {
	t.Helper()
	b.Sample(t.Context(), func(e capture.Event) { events = append(events, e) })
	return events
}

func count(events []capture.Event, kind capture.EventKind) (n int) {
	for _, e := range events {
		if e.Kind == kind {
			n++
		}
	}
	return n
}

func connect(t *testing.T, ns *nettest.NS, l net.Listener) (near, far net.Conn) {
	t.Helper()
	err := ns.Do(func() (err error) {
		near, err = net.Dial("tcp", l.Addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if far, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

func TestSeesBothEndsOnceWithTheirProcess(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		b, ns := watched(t, capture.LoopbackObserve)
		l := ns.Listen(t, addr)
		connect(t, ns, l)
		events := sample(t, b)
		if count(events, capture.Listening) != 1 || count(events, capture.Connected) != 1 || count(events, capture.Accepted) != 1 {
			t.Fatalf("%s: first sample: %+v", addr, events)
		}
		for _, e := range events {
			if int(e.Flow.Caller.PID) != os.Getpid() || e.Comm == "" || e.Flow.Scope != "s" {
				t.Errorf("%s: %+v", addr, e)
			}
			if want := netip.MustParseAddrPort(l.Addr().String()); e.Flow.Destination != want {
				t.Errorf("%s: destination %v", addr, e.Flow.Destination)
			}
			if (e.Kind == capture.Connected) != (e.Flow.Direction == flow.Outbound) {
				t.Errorf("%s: kind %v, direction %v", addr, e.Kind, e.Flow.Direction)
			}
		}
		if again := sample(t, b); len(again) != 0 {
			t.Errorf("%s: told twice: %+v", addr, again)
		}
		l.Close()
		if events := sample(t, b); count(events, capture.Closed) != 1 {
			t.Errorf("%s: after close: %+v", addr, events)
		}
	}
}

// A connection that comes and goes between two samples is known from its end.
func TestSeesShortConnections(t *testing.T) {
	b, ns := watched(t, capture.LoopbackObserve)
	l := ns.Listen(t, "127.0.0.1:0")
	sample(t, b)
	near, far := connect(t, ns, l)
	from := near.LocalAddr().String()
	near.Close()
	if _, err := io.Copy(io.Discard, far); err != nil {
		t.Fatal(err)
	}
	far.Close()
	var events []capture.Event
	nettest.Wait(t, "the ended connection", func() bool {
		events = append(events, sample(t, b)...)
		return count(events, capture.Connected) > 0
	})
	for range 3 {
		events = append(events, sample(t, b)...)
	}
	if n := count(events, capture.Connected); n != 1 {
		t.Errorf("told %d times", n)
	}
	for _, e := range events {
		if e.Kind == capture.Connected && (e.Flow.Source.String() != from || e.Bypassing) {
			t.Errorf("%+v, want source %s", e, from)
		}
	}
}

func TestLoopbackIgnored(t *testing.T) {
	b, ns := watched(t, capture.LoopbackIgnore)
	connect(t, ns, ns.Listen(t, "127.0.0.1:0"))
	if events := sample(t, b); count(events, capture.Connected)+count(events, capture.Accepted) != 0 {
		t.Errorf("events = %+v", events)
	}
}

// Of a captured scope only what stays on the host is told, and nothing of the
// agent's; several such scopes take turns.
func TestLoopbackOnly(t *testing.T) {
	ns, peer := nettest.NetNS(t, "rf-test-obs"), nettest.NetNS(t, "rf-test-far")
	nettest.VethPair(t, ns, peer, "192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "2001:db8::2/64")
	h, err := netns.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	b := New()
	t.Cleanup(func() { b.Close(true) })
	for name, except := range map[string]uint64{"agent": ownID(t), "some": 1 << 60} {
		if err := b.WatchLoopback(capture.Scope{Name: name, NS: h, Mode: authz.Enforce}, except); err != nil {
			t.Fatal(err)
		}
	}
	local := ns.Listen(t, "127.0.0.1:0")
	connect(t, ns, local)
	connect(t, ns, peer.Listen(t, "192.0.2.2:0"))
	connect(t, peer, ns.Listen(t, "192.0.2.1:0"))
	events := append(sample(t, b), sample(t, b)...)
	if len(events) != 2 || count(events, capture.Connected) != 1 || count(events, capture.Accepted) != 1 {
		t.Errorf("events = %+v", events)
	}
	for _, e := range events {
		if e.Flow.Scope != "some" || e.Flow.Destination.String() != local.Addr().String() || int(e.Flow.Caller.PID) != os.Getpid() {
			t.Errorf("%+v", e)
		}
	}
	if again := append(sample(t, b), sample(t, b)...); len(again) != 0 {
		t.Errorf("told twice: %+v", again)
	}
}

func TestWatchesOnlyAndSaysSo(t *testing.T) {
	b, ns := watched(t, capture.LoopbackObserve)
	s := capture.Scope{Name: "s", Mode: authz.Enforce}
	if err := b.SetMode(t.Context(), s); !errors.Is(err, ErrWatchOnly) {
		t.Errorf("SetMode(enforce) = %v", err)
	}
	s.Name = "t"
	if err := b.Add(t.Context(), s); !errors.Is(err, ErrWatchOnly) {
		t.Errorf("Add(enforce) = %v", err)
	}
	if wrong := b.Verify("s"); len(wrong) == 0 || !strings.Contains(wrong[0], "nothing is redirected") {
		t.Errorf("Verify = %q", wrong)
	}
	if wrong := b.Verify("gone"); len(wrong) == 0 {
		t.Error("an unknown scope is covered")
	}
	if _, err := b.Origin("s", flow.Outbound, -1, netip.AddrPort{}, netip.AddrPort{}); !errors.Is(err, capture.ErrNoOrigin) {
		t.Errorf("Origin = %v", err)
	}
	// Watching brings no packet filter and no conntrack into the namespace.
	if text := ns.Exec(t, "cat", "/proc/net/ip_tables_names"); text != "" {
		t.Errorf("tables: %q", text)
	}
	if text := strings.TrimSpace(ns.Exec(t, "sysctl", "-n", "net.netfilter.nf_conntrack_count")); text != "0" {
		t.Errorf("tracked connections: %s", text)
	}
}

func TestRunEnds(t *testing.T) {
	b, ns := watched(t, capture.LoopbackObserve)
	ns.Listen(t, "127.0.0.1:0")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var once sync.Once
	if err := b.Run(ctx, func(capture.Event) { once.Do(cancel) }); err != nil {
		t.Error(err)
	}
	if err := b.Remove(t.Context(), "s"); err != nil {
		t.Error(err)
	}
	if err := b.Remove(t.Context(), "s"); err != nil {
		t.Errorf("second Remove: %v", err)
	}
	if len(b.Tables()) != 0 {
		t.Errorf("Tables = %+v", b.Tables())
	}
}

func TestUncoveredIsMarked(t *testing.T) {
	b, ns := watched(t, capture.LoopbackObserve)
	connect(t, ns, ns.Listen(t, "127.0.0.1:0"))
	_, id := nettest.Cgroup(t, "rf-test-obs")
	if err := b.SetCgroups("s", []capture.Cgroup{{ID: id, Covered: true}, {ID: ownID(t), Covered: false}}); err != nil {
		t.Fatal(err)
	}
	for _, e := range sample(t, b) {
		if e.Kind == capture.Connected && !e.Bypassing {
			t.Errorf("%+v", e)
		}
	}
}

func ownID(t *testing.T) uint64 {
	t.Helper()
	f := newFinder()
	if f.tree == nil {
		t.Skip("no cgroup v2 mounted")
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			id, err := f.tree.ID(path)
			if err != nil {
				t.Fatal(err)
			}
			return id
		}
	}
	t.Fatal("no cgroup v2 path")
	return 0
}

// More sockets may end than anybody wants to remember.
func TestEndedSocketsAreBounded(t *testing.T) {
	d := &destroyEvents{lost: new(atomic.Uint64)}
	message := diagMessage(unix.AF_INET)
	for range queue + 10 {
		d.parse(message)
	}
	if n := len(d.take()); n != queue || d.lost.Load() != 10 {
		t.Errorf("%d kept, %d lost", n, d.lost.Load())
	}
}

// diagMessage is one netlink message with a struct inet_diag_msg.
func diagMessage(family byte) []byte {
	b := make([]byte, unix.SizeofNlMsghdr+diagMsgLen+unix.SizeofNlAttr+8)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	body := b[unix.SizeofNlMsghdr:]
	body[0] = family
	binary.BigEndian.PutUint16(body[4:], 40000)
	binary.BigEndian.PutUint16(body[6:], 80)
	copy(body[8:], []byte{192, 0, 2, 1})
	copy(body[24:], []byte{192, 0, 2, 2})
	binary.NativeEndian.PutUint16(body[diagMsgLen:], unix.SizeofNlAttr+8)
	binary.NativeEndian.PutUint16(body[diagMsgLen+2:], diagCgroupID)
	binary.NativeEndian.PutUint64(body[diagMsgLen+4:], 77)
	return b
}

func TestParseDiag(t *testing.T) {
	s, err := parseDiag(diagMessage(unix.AF_INET)[unix.SizeofNlMsghdr:])
	if err != nil || s.Source.String() != "192.0.2.1:40000" || s.Destination.String() != "192.0.2.2:80" || s.CgroupID != 77 {
		t.Errorf("%+v, %v", s, err)
	}
}

func FuzzDestroyEvents(f *testing.F) {
	f.Add(diagMessage(unix.AF_INET))
	f.Add(diagMessage(unix.AF_INET6))
	f.Add([]byte{16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		d := &destroyEvents{lost: new(atomic.Uint64)}
		d.parse(b)
		if len(d.take()) > queue {
			t.Error("queue is unbounded")
		}
	})
}
