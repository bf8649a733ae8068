package proxy_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy"
	"ringfence.dev/proxy/proxytest"
	"ringfence.dev/proxy/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var lastHost atomic.Uint32

// hostIP is a loopback address of a test's own, so that the tunnel's fixed port is free on it.
func hostIP() string {
	n := lastHost.Add(1)
	return fmt.Sprintf("127.%d.%d.%d", 32+os.Getpid()%200, 1+n/250, 1+n%250)
}

// host is one agent: a relay with one scope on a loopback address.
type host struct {
	tb    testing.TB
	relay *proxy.Relay
	scope *proxy.Scope
	net   *proxytest.Network
	who   *proxytest.Identifier
	dec   *proxytest.Decider
	ca    *proxytest.CA

	outbound, inbound, tunnel netip.AddrPort
	served                    chan struct{}
}

type hostConfig struct {
	mode     authz.Mode
	policy   proxytest.Policy
	pins     map[netip.Addr]string
	noTunnel bool
	tune     func(*proxy.Config)
}

func who(name string) workload.Identity {
	return workload.Identity{ID: spiffeid.RequireFromString("spiffe://lab.test/ns/" + name), Name: name}
}

// patience bounds every wait; a busy machine under the race detector needs it.
const patience = time.Minute

const uid = 1000 // of every caller, unless a test says otherwise

func newHost(tb testing.TB, ca *proxytest.CA, c hostConfig) *host {
	tb.Helper()
	h := &host{
		tb: tb, ca: ca, net: proxytest.NewNetwork(tb, hostIP()),
		who: proxytest.NewIdentifier(), dec: proxytest.NewDecider(tb, c.policy),
		served: make(chan struct{}),
	}
	cfg := proxy.Config{Identifier: h.who, Decider: h.dec, Credentials: ca, Pins: c.pins}
	if c.tune != nil {
		c.tune(&cfg)
	}
	var err error
	if h.relay, err = proxy.New(cfg); err != nil {
		tb.Fatal(err)
	}
	sc := proxy.ScopeConfig{Name: "s", Mode: c.mode, Network: h.net}
	sc.Outbound, h.outbound = h.listen(0)
	sc.Inbound, h.inbound = h.listen(0)
	if !c.noTunnel {
		sc.Tunnel, h.tunnel = h.listen(tunnel.Port)
	}
	if h.scope, err = h.relay.AddScope(sc); err != nil {
		tb.Fatal(err)
	}
	go func() {
		defer close(h.served)
		if err := h.scope.Serve(context.Background()); err != nil {
			tb.Error(err)
		}
	}()
	tb.Cleanup(func() {
		h.relay.Close()
		within(tb, "Serve to return", h.served)
	})
	return h
}

func (h *host) listen(port uint16) ([]int, netip.AddrPort) {
	fd, addr := h.net.Listen(port)
	return []int{fd}, addr
}

func within(tb testing.TB, what string, done <-chan struct{}) {
	tb.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		tb.Fatalf("waited too long for %s", what)
	}
}

func eventually(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	deadline := time.Now().Add(patience)
	for !cond() {
		if time.Now().After(deadline) {
			tb.Fatalf("waited too long for %s", what)
		}
		time.Sleep(2 * time.Millisecond) // between looks; the condition is the event
	}
}

// service is a server on a host's own address.
func (h *host) service(tb testing.TB, name string, serve func(net.Conn)) netip.AddrPort {
	tb.Helper()
	l, err := net.Listen("tcp", h.net.IP.String()+":0")
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	tb.Cleanup(func() { l.Close(); wg.Wait() })
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	h.who.SetOwner(addr.Port(), who(name))
	return addr
}

func (h *host) web(tb testing.TB, name string, handler http.HandlerFunc) netip.AddrPort {
	tb.Helper()
	l, err := net.Listen("tcp", h.net.IP.String()+":0")
	if err != nil {
		tb.Fatal(err)
	}
	srv := &http.Server{Handler: handler}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	tb.Cleanup(func() { srv.Close(); <-done })
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	h.who.SetOwner(addr.Port(), who(name))
	return addr
}

// dial opens a connection as a workload of the host that wants to.
func (h *host) dial(tb testing.TB, to netip.AddrPort) *net.TCPConn {
	tb.Helper()
	return h.dialAs(tb, h.outbound, to, uid)
}

func (h *host) dialAs(tb testing.TB, listener, to netip.AddrPort, uid uint32) *net.TCPConn {
	tb.Helper()
	c, err := h.net.Dial(listener, to, uid)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

// denied dials until the reset, which may come before the dial returns.
func (h *host) denied(tb testing.TB, to netip.AddrPort) {
	tb.Helper()
	h.deniedAs(tb, h.outbound, to, uid)
}

func (h *host) deniedAs(tb testing.TB, listener, to netip.AddrPort, uid uint32) {
	tb.Helper()
	c, err := h.net.Dial(listener, to, uid)
	if err != nil {
		if !errors.Is(err, unix.ECONNRESET) {
			tb.Error(err)
		}
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	wantReset(tb, c)
}

// pair is two hosts of one trust domain: a calls, b serves.
func pair(tb testing.TB, mode authz.Mode, pa, pb proxytest.Policy) (a, b *host) {
	tb.Helper()
	ca := proxytest.NewCA(tb, "lab.test")
	b = newHost(tb, ca, hostConfig{mode: mode, policy: pb})
	a = newHost(tb, ca, hostConfig{mode: mode, policy: pa})
	a.who.SetCaller(uid, who("a/sa/caller"))
	b.who.SetSole(who("b/sa/node"))
	return a, b
}

func echo(c net.Conn) { _, _ = io.Copy(c, c); _ = c.(*net.TCPConn).CloseWrite() }

func exchange(tb testing.TB, c net.Conn, text string) {
	tb.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		tb.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		tb.Fatalf("echo of %q: %q, %v", text, got, err)
	}
}

// get sends one HTTP request on a connection and returns the answer.
func get(tb testing.TB, c net.Conn, r *bufio.Reader, path string, lines ...string) (*http.Response, string) {
	tb.Helper()
	req := "GET " + path + " HTTP/1.1\r\nHost: b.test\r\n"
	for _, l := range lines {
		req += l + "\r\n"
	}
	if _, err := io.WriteString(c, req+"\r\n"); err != nil {
		tb.Fatal(err)
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		tb.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatal(err)
	}
	return resp, string(body)
}
