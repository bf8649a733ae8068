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
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy"
	"ringfence.dev/proxy/proxytest"
)

func deny(authz.Connection) bool { return false }

func onlySide(side authz.Side) func(authz.Connection) bool {
	return func(c authz.Connection) bool { return c.Side != side }
}

// wantReset wants the connection to end with RST before any octet.
func wantReset(tb testing.TB, c net.Conn) {
	tb.Helper()
	// The kernel tells of a reset once, to whichever call comes first.
	if _, err := io.WriteString(c, "hello"); errors.Is(err, unix.ECONNRESET) {
		return
	}
	n, err := c.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, unix.ECONNRESET) {
		tb.Errorf("read %d octets, %v; want a reset", n, err)
	}
}

// forbidden is a service that nothing may reach.
func forbidden(tb testing.TB, h *host, name string) netip.AddrPort {
	return h.service(tb, name, func(c net.Conn) { tb.Errorf("%s was reached from %s", name, c.RemoteAddr()) })
}

func TestDenyBeforeUpstream(t *testing.T) {
	t.Run("egress", func(t *testing.T) {
		a, b := pair(t, authz.Enforce, proxytest.Policy{Connect: deny}, proxytest.Policy{})
		a.denied(t, forbidden(t, b, "b/sa/svc"))
		if len(b.net.Dials()) != 0 || b.relay.Stats().AcceptedStreams != 0 {
			t.Error("something went up")
		}
		if got := a.net.RefusedFlows(); len(got) != 1 {
			t.Errorf("kernel was told %v", got)
		}
		if !a.dec.Logged("egress connect spiffe://lab.test/ns/a/sa/caller -> spiffe://lab.test/ns/b/sa/svc mesh=true: deny") {
			t.Errorf("log = %q", a.dec.Log())
		}
	})
	t.Run("ingress", func(t *testing.T) {
		a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{Connect: deny})
		a.denied(t, forbidden(t, b, "b/sa/svc"))
		if len(b.net.Dials()) != 0 || a.relay.Stats().Answers != 1 {
			t.Error("not refused by the far side alone")
		}
	})
	t.Run("local", func(t *testing.T) {
		a, _ := pair(t, authz.Enforce, proxytest.Policy{Connect: deny}, proxytest.Policy{})
		a.denied(t, forbidden(t, a, "a/sa/svc"))
		if !a.dec.Logged("local connect spiffe://lab.test/ns/a/sa/caller -> spiffe://lab.test/ns/a/sa/svc mesh=true: deny") {
			t.Errorf("log = %q", a.dec.Log())
		}
	})
	t.Run("plain", func(t *testing.T) {
		a, b := pair(t, authz.Enforce, proxytest.Policy{Connect: deny}, proxytest.Policy{})
		a.net.SetMesh(false)
		a.denied(t, forbidden(t, b, "b/sa/svc"))
		if a.relay.Stats().Probes != 0 || len(a.net.Dials()) != 0 {
			t.Error("something was dialled")
		}
	})
	t.Run("inbound plaintext", func(t *testing.T) {
		_, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{Connect: deny})
		b.deniedAs(t, b.inbound, forbidden(t, b, "b/sa/svc"), 0)
	})
}

func TestBrokenPolicyFailsClosed(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{Broken: true}, proxytest.Policy{})
	a.denied(t, forbidden(t, b, "b/sa/svc"))
	a.denied(t, forbidden(t, a, "a/sa/svc"))
	if len(a.net.RefusedFlows()) != 0 {
		t.Error("the kernel was told to refuse what policy has not refused")
	}
	// The same in dry-run lets everything pass.
	a, b = pair(t, authz.DryRun, proxytest.Policy{Broken: true}, proxytest.Policy{Broken: true})
	exchange(t, a.dial(t, b.service(t, "b/sa/echo", echo)), "passes")
	exchange(t, a.dial(t, a.service(t, "a/sa/echo", echo)), "passes")
}

func TestUnidentified(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := forbidden(t, b, "b/sa/svc")
	a.deniedAs(t, a.outbound, to, 4711)
	// Nobody listens: the far side answers, the near client is reset.
	a.denied(t, netip.AddrPortFrom(b.net.IP, 1))
	if !a.dec.Logged("nobody listens there") {
		t.Errorf("log = %q", a.dec.Log())
	}
	a.denied(t, netip.AddrPortFrom(a.net.IP, 1))

	a, b = pair(t, authz.DryRun, proxytest.Policy{Connect: deny}, proxytest.Policy{Connect: deny})
	to = b.service(t, "b/sa/echo", echo)
	exchange(t, a.dialAs(t, a.outbound, to, 4711), "dry-run refuses nothing")
	if !a.dec.Logged("refuse: caller has no identity") || !a.dec.Logged("would_deny") {
		t.Errorf("log = %q", a.dec.Log())
	}
}

// A connection straight to a listener, and one to the agent's own ports, get nothing.
func TestDirectAndLoops(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	for _, l := range []netip.AddrPort{a.outbound, a.inbound} {
		if c, err := net.Dial("tcp", l.String()); err == nil {
			wantReset(t, c)
			c.Close()
		}
	}
	if n := a.relay.Stats().NoOrigin; n != 2 {
		t.Errorf("no origin: %d", n)
	}
	for _, port := range []uint16{15001, 15006, 15008} {
		a.denied(t, netip.AddrPortFrom(a.net.IP, port))
		a.who.SetOwner(port, who("a/sa/x"))
		b.who.SetOwner(port, who("b/sa/x"))
		a.denied(t, netip.AddrPortFrom(b.net.IP, port))
	}
	if n := a.relay.Stats().Loops; n != 3 {
		t.Errorf("loops on this side: %d", n)
	}
	if n := b.relay.Stats().Loops; n != 3 {
		t.Errorf("loops on the far side: %d", n)
	}
}

func httpOnly(authz.Connection) bool { return true }

// TestHTTPRequests holds for every way to a service: through a tunnel, on the
// same host, and in plaintext from a stranger.
func TestHTTPRequests(t *testing.T) {
	policy := proxytest.Policy{
		HTTPOnly: httpOnly,
		Request:  func(_ authz.Connection, r authz.Request) bool { return !strings.HasPrefix(r.Target, "/secret") },
	}
	for name, dial := range waysToService(t, policy) {
		t.Run(name, func(t *testing.T) {
			var served atomic.Int64
			c, caller := dial(t, func(w http.ResponseWriter, r *http.Request) {
				served.Add(1)
				fmt.Fprint(w, r.URL.Path, r.Header.Values("X-Forwarded-Client-Cert"))
			})
			r := bufio.NewReader(c)
			if resp, body := get(t, c, r, "/open"); resp.StatusCode != 200 || !strings.Contains(body, caller) {
				t.Fatalf("%d %q", resp.StatusCode, body)
			}
			resp, body := get(t, c, r, "/secret")
			want := http.StatusForbidden
			if caller == "" {
				want = http.StatusUnauthorized
			}
			if resp.StatusCode != want || resp.Header.Get("Ringfence-Decision") == "" ||
				resp.Header.Get("Content-Type") != "application/problem+json" || !strings.Contains(body, resp.Header.Get("Ringfence-Decision")) {
				t.Errorf("denial: %d %v %q", resp.StatusCode, resp.Header, body)
			}
			// Three at once: the refused one in the middle does not harm its neighbours.
			const req = " HTTP/1.1\r\nHost: b.test\r\n\r\n"
			_, _ = io.WriteString(c, "GET /1"+req+"GET /secret/2"+req+"GET /3"+req)
			var got []int
			for range 3 {
				resp, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				got = append(got, resp.StatusCode)
			}
			if fmt.Sprint(got) != fmt.Sprint([]int{200, want, 200}) {
				t.Errorf("pipelined: %v", got)
			}
			if n := served.Load(); n != 3 {
				t.Errorf("the server saw %d requests, want 3", n)
			}
		})
	}
}

// waysToService gives, per carrier, how to reach a web service in an enforcing
// scope, and who the server is to be told is calling.
func waysToService(t *testing.T, policy proxytest.Policy) map[string]func(*testing.T, http.HandlerFunc) (net.Conn, string) {
	return map[string]func(*testing.T, http.HandlerFunc) (net.Conn, string){
		"tunnel": func(t *testing.T, h http.HandlerFunc) (net.Conn, string) {
			a, b := pair(t, authz.Enforce, proxytest.Policy{}, policy)
			return a.dial(t, b.web(t, "b/sa/web", h)), "URI=spiffe://lab.test/ns/a/sa/caller"
		},
		"local": func(t *testing.T, h http.HandlerFunc) (net.Conn, string) {
			a, _ := pair(t, authz.Enforce, policy, proxytest.Policy{})
			return a.dial(t, a.web(t, "a/sa/web", h)), "By=spiffe://lab.test/ns/a/sa/web;URI=spiffe://lab.test/ns/a/sa/caller"
		},
		"plaintext": func(t *testing.T, h http.HandlerFunc) (net.Conn, string) {
			_, b := pair(t, authz.Enforce, proxytest.Policy{}, policy)
			return b.dialAs(t, b.inbound, b.web(t, "b/sa/web", h), 0), ""
		},
	}
}

func TestNotHTTPOnHTTPOnlyService(t *testing.T) {
	for name, first := range map[string]string{
		"h2 preface": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/0.9": "GET /\r\n", "leading CRLF": "\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"redis": "PING\r\n", "TLS": "\x16\x03\x01\x02\x00", "smuggling": "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{HTTPOnly: httpOnly})
			to := b.service(t, "b/sa/web", func(c net.Conn) {
				if p, _ := io.ReadAll(c); len(p) > 0 {
					t.Errorf("the service got %q", p)
				}
			})
			c := a.dial(t, to)
			_, _ = io.WriteString(c, first)
			answer, err := io.ReadAll(c)
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 ") || !strings.Contains(string(answer), "Connection: close") {
				t.Errorf("answer %q, %v", answer, err)
			}
			// Dry-run lets the same pass, and says what it would have done.
			a, b = pair(t, authz.DryRun, proxytest.Policy{}, proxytest.Policy{HTTPOnly: httpOnly})
			c = a.dial(t, b.service(t, "b/sa/web", echo))
			exchange(t, c, first)
			if !b.dec.Logged("refuse: ") {
				t.Errorf("log = %q", b.dec.Log())
			}
		})
	}
}

func TestBrokenPolicyRefusesRequests(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{HTTPOnly: httpOnly})
	c := a.dial(t, b.web(t, "b/sa/web", func(http.ResponseWriter, *http.Request) { t.Error("reached") }))
	eventually(t, "the connection", func() bool { return len(b.relay.Connections()) == 1 })
	b.dec.Set(proxytest.Policy{Broken: true, HTTPOnly: httpOnly})
	resp, _ := get(t, c, bufio.NewReader(c), "/")
	if resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("status %d", resp.StatusCode)
	}
}

func TestReevaluate(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	one, two := b.service(t, "b/sa/one", echo), b.service(t, "b/sa/two", echo)
	local := a.service(t, "a/sa/local", echo)
	c1, c2, c3 := a.dial(t, one), a.dial(t, two), a.dial(t, local)
	for _, c := range []net.Conn{c1, c2, c3} {
		exchange(t, c, "alive")
	}
	if n := a.relay.Reevaluate() + b.relay.Reevaluate(); n != 0 {
		t.Errorf("an unchanged policy closed %d", n)
	}
	notTwo := func(c authz.Connection) bool { return c.Destination.Addr != two }
	b.dec.Set(proxytest.Policy{Connect: notTwo})
	if n := b.relay.Reevaluate(); n != 1 {
		t.Errorf("closed %d at the ingress, want 1", n)
	}
	wantReset(t, c2)
	exchange(t, c1, "alive")
	a.dec.Set(proxytest.Policy{Connect: func(c authz.Connection) bool { return c.Side != authz.Local }})
	if n := a.relay.Reevaluate(); n != 1 {
		t.Errorf("closed %d, want 1", n)
	}
	wantReset(t, c3)
	exchange(t, c1, "alive")
	a.dec.Set(proxytest.Policy{Broken: true})
	a.relay.Reevaluate()
	wantReset(t, c1)
}

func TestSetMode(t *testing.T) {
	policy := proxytest.Policy{Connect: onlySide(authz.Local), HTTPOnly: func(c authz.Connection) bool { return c.Side == authz.Ingress }}
	a, b := pair(t, authz.DryRun, policy, policy)
	denied, fine := a.dial(t, a.service(t, "a/sa/echo", echo)), a.dial(t, b.web(t, "b/sa/web", func(http.ResponseWriter, *http.Request) {}))
	opaque := a.dial(t, b.service(t, "b/sa/echo", echo))
	exchange(t, denied, "would be denied")
	exchange(t, opaque, "\x00 is not HTTP")
	r := bufio.NewReader(fine)
	get(t, fine, r, "/")
	a.scope.SetMode(authz.Enforce)
	b.scope.SetMode(authz.Enforce)
	wantReset(t, denied)
	wantReset(t, opaque)
	get(t, fine, r, "/")
	if a.scope.Mode() != authz.Enforce {
		t.Error("mode was not set")
	}
	b.dec.Set(proxytest.Policy{HTTPOnly: httpOnly, Request: func(authz.Connection, authz.Request) bool { return false }})
	if resp, _ := get(t, fine, r, "/"); resp.StatusCode != http.StatusForbidden {
		t.Errorf("a live connection is still in dry-run: %d", resp.StatusCode)
	}
}

func TestConfigIsChecked(t *testing.T) {
	ca := proxytest.NewCA(t, "lab.test")
	good := proxy.Config{Identifier: proxytest.NewIdentifier(), Decider: proxytest.NewDecider(t, proxytest.Policy{}), Credentials: ca}
	bad := []proxy.Config{{}, good, good}
	bad[1].Pins = map[netip.Addr]string{netip.MustParseAddr("192.0.2.1"): "not an id"}
	bad[2].Pins = map[netip.Addr]string{netip.MustParseAddr("::ffff:192.0.2.1"): "spiffe://lab.test/ns/b"}
	for i, c := range bad {
		if _, err := proxy.New(c); err == nil {
			t.Errorf("configuration %d was taken", i)
		}
	}
	r, err := proxy.New(good)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	n := proxytest.NewNetwork(t, hostIP())
	fd, _ := n.Listen(0)
	for _, c := range []proxy.ScopeConfig{{}, {Name: "s"}, {Network: n}, {Name: "s", Network: n, Outbound: []int{fd, -1}}} {
		if _, err := r.AddScope(c); err == nil {
			t.Errorf("scope %+v was taken", c)
		}
	}
	if _, err := r.AddScope(proxy.ScopeConfig{Name: "s", Network: n}); err != nil {
		t.Error(err)
	}
	if _, err := r.AddScope(proxy.ScopeConfig{Name: "s", Network: n}); err == nil {
		t.Error("two scopes of one name")
	}
	r.Drain(context.Background())
	if _, err := r.AddScope(proxy.ScopeConfig{Name: "t", Network: n}); !errors.Is(err, proxy.ErrStopped) {
		t.Errorf("AddScope after Drain: %v", err)
	}
}

// A connection that is decided, but not in the table yet while policies change,
// is decided again when it enters.
func TestReevaluateWhileSettingUp(t *testing.T) {
	for _, side := range []authz.Side{authz.Egress, authz.Ingress} {
		t.Run(side.String(), func(t *testing.T) {
			a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
			to := b.service(t, "b/sa/one", echo)
			deciding := b
			if side != authz.Ingress {
				deciding = a
			}
			var once sync.Once
			deciding.dec.Set(proxytest.Policy{Connect: func(authz.Connection) bool {
				once.Do(func() {
					deciding.dec.Set(proxytest.Policy{Connect: func(authz.Connection) bool { return false }})
					deciding.relay.Reevaluate()
				})
				return true
			}})
			wantReset(t, a.dial(t, to))
		})
	}
}
