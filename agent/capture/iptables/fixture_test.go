package iptables

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/cni/netns"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

// addresses of the two hosts, by family.
type family struct {
	name         string
	f            fw.Family
	loop, us, it string
}

var famAddr = netip.MustParseAddrPort("127.0.0.1:1")

var families = []family{
	{"IPv4", fw.IPv4, "127.0.0.1", "192.0.2.1", "192.0.2.2"},
	{"IPv6", fw.IPv6, "::1", "2001:db8::1", "2001:db8::2"},
}

func (f family) at(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }

// host is a scope with its agent, and a bare peer on the other end of a wire.
type host struct {
	t     *testing.T
	ns    *nettest.NS // the scope
	peer  *nettest.NS
	h     *netns.Handle
	b     *Backend
	scope capture.Scope

	mu        sync.Mutex
	listeners []*net.TCPListener
	serving   sync.WaitGroup
	flows     []flow.Flow // guarded by mu
	remote    string      // of the latest captured connection, as the listener sees it; guarded by mu
}

// newHost makes the two hosts; the agent listens, nothing is captured yet.
func newHost(t *testing.T, v fw.Variant, guard *Guard) *host {
	nettest.RequireRoot(t)
	h := &host{t: t, ns: nettest.NetNS(t, "rf-test-a"), peer: nettest.NetNS(t, "rf-test-b")}
	nettest.VethPair(t, h.ns, h.peer, "192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "2001:db8::2/64")
	var err error
	if h.h, err = netns.Open(h.ns.Path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.h.Close() })
	if h.b, err = New(t.Context(), Config{Variant: v, Guard: guard}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.b.Close(true); err != nil {
			t.Error(err)
		}
		h.die()
	})
	h.scope = capture.Scope{Name: "test", NS: h.h, Loopback: capture.LoopbackObserve}
	h.live()
	return h
}

// live opens the agent's listeners and serves them: each connection is told its origin.
func (h *host) live() {
	h.t.Helper()
	for _, f := range families {
		network := "tcp4"
		if f.f == fw.IPv6 {
			network = "tcp6"
		}
		h.listen(network, f.at(f.loop, capture.OutboundPort), flow.Outbound, &h.scope.Outbound)
		h.listen(network, f.at(f.loop, capture.InboundPort), flow.Inbound, &h.scope.Inbound)
		h.listen(network, ":"+strconv.Itoa(capture.TunnelPort), 99, nil)
	}
}

func (h *host) listen(network, addr string, d flow.Direction, fds *[]int) {
	h.t.Helper()
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error {
		family := unix.AF_INET
		if network == "tcp6" {
			family = unix.AF_INET6
		}
		var err error
		cerr := c.Control(func(fd uintptr) { err = ListenControl(0, family, int(fd)) })
		return errors.Join(cerr, err)
	}}
	lc.SetMultipathTCP(false)
	var l net.Listener
	if err := h.ns.Do(func() (err error) {
		l, err = lc.Listen(context.Background(), network, addr)
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	tl := l.(*net.TCPListener)
	if fds != nil {
		raw, err := tl.SyscallConn()
		if err != nil {
			h.t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) { *fds = append(*fds, int(fd)) })
	}
	h.listeners = append(h.listeners, tl)
	h.serving.Add(1)
	go h.serve(tl, d)
}

func (h *host) serve(l *net.TCPListener, d flow.Direction) {
	defer h.serving.Done()
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			return
		}
		fmt.Fprint(conn, h.tell(conn, d))
		conn.Close()
	}
}

func (h *host) tell(conn *net.TCPConn, d flow.Direction) string {
	if d == 99 {
		return "tunnel"
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err.Error()
	}
	var f flow.Flow
	cerr := raw.Control(func(fd uintptr) {
		f, err = h.b.Origin("test", d, int(fd), netip.MustParseAddrPort(conn.LocalAddr().String()), netip.MustParseAddrPort(conn.RemoteAddr().String()))
	})
	switch {
	case errors.Is(err, capture.ErrNoOrigin):
		return "no origin"
	case cerr != nil || err != nil:
		return fmt.Sprint(err, cerr)
	}
	h.mu.Lock()
	h.flows, h.remote = append(h.flows, f), conn.RemoteAddr().String()
	h.mu.Unlock()
	return fmt.Sprintf("%v %v", d, f.Destination)
}

// last is the flow of the latest captured connection.
func (h *host) last() flow.Flow {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.flows) == 0 {
		return flow.Flow{}
	}
	return h.flows[len(h.flows)-1]
}

// seenFrom is where the listener saw the latest captured connection come from.
func (h *host) seenFrom() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.remote
}

// die closes the agent's listeners, as the end of its process does.
func (h *host) die() {
	for _, l := range h.listeners {
		l.Close()
	}
	h.listeners, h.scope.Outbound, h.scope.Inbound = nil, nil, nil
	h.serving.Wait()
}

func (h *host) add(mode authz.Mode) {
	h.t.Helper()
	h.scope.Mode = mode
	if err := h.b.Add(h.t.Context(), h.scope); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) setMode(mode authz.Mode) {
	h.t.Helper()
	h.scope.Mode = mode
	if err := h.b.SetMode(h.t.Context(), h.scope); err != nil {
		h.t.Fatal(err)
	}
}

// want dials as a workload of the scope.
func (h *host) want(cgroupPath, want string, args ...string) {
	h.t.Helper()
	if got, _ := runAs(h.t, h.ns, cgroupPath, append([]string{"dial"}, args...)...); got != want {
		h.t.Errorf("dial %v from %s: %q, want %q", args, cgroupPath, got, want)
	}
}

// wantPeer dials from the bare host.
func (h *host) wantPeer(want, addr string) {
	h.t.Helper()
	if got, _ := runAs(h.t, h.peer, cg.other, "dial", addr); got != want {
		h.t.Errorf("dial %s from the other host: %q, want %q", addr, got, want)
	}
}

// serveBanner answers every connection to addr in ns with text, from this process.
func serveBanner(t *testing.T, ns *nettest.NS, addr, text string) {
	t.Helper()
	l := ns.Listen(t, addr)
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, text)
			conn.Close()
		}
	}()
}

func forEachVariant(t *testing.T, f func(t *testing.T, v fw.Variant)) {
	nettest.RequireRoot(t)
	tools, err := fw.Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range tools.Variants() {
		t.Run(string(v), func(t *testing.T) { f(t, v) })
	}
}
