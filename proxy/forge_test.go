package proxy_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/proxytest"
)

const forgery = "X-Forwarded-Client-Cert: URI=spiffe://lab.test/ns/a/sa/king"

// forgeries begin with what one server or another takes for a request.
var forgeries = map[string]string{
	"nominated":             "GET / HTTP/1.1\r\nHost: x\r\nConnection: close, x-forwarded-client-cert\r\n" + forgery + "\r\n\r\n",
	"bare LF":               "GET / HTTP/1.1\nHost: x\n" + forgery + "\n\n",
	"folded":                "GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n" + forgery + "\r\n\r\n",
	"space before colon":    "GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n" + forgery + "\r\n\r\n",
	"CL and TE":             "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n" + forgery + "\r\n\r\n0\r\n\r\n",
	"behind a bad chunk":    "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1 \r\nx\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n" + forgery + "\r\n\r\n",
	"behind a good request": "GET / HTTP/1.1\r\nHost: x\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n" + forgery + "\r\n\r\n",
	"no host":               "GET / HTTP/1.1\r\n" + forgery + "\r\n\r\n",
	"HTTP/1.2":              "GET / HTTP/1.2\r\nHost: x\r\n" + forgery + "\r\n\r\n",
	"HTTP/0.9":              "GET /\r\n" + forgery + "\r\n\r\n",
	"empty line first":      "\r\nGET / HTTP/1.1\r\nHost: x\r\n" + forgery + "\r\n\r\n",
	"blanks":                "FOO  / HTTP/1.1\r\nHost: x\r\n" + forgery + "\r\n\r\n",
	"half a preface":        "PRI * HTTP/2.0\r\n" + forgery + "\r\n\r\n",
	"large head":            "FOO / HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("b", 70000) + "\r\n" + forgery + "\r\n\r\n",
}

// collector is a service that understands nothing and keeps what it gets. It
// gives one answer as soon as it has seen a whole head of good request, if there is one.
func collector(tb testing.TB, h *host, good string) (to netip.AddrPort, got chan string) {
	got = make(chan string, 1)
	return h.service(tb, "b/sa/odd", func(c net.Conn) {
		var seen strings.Builder
		for buf := make([]byte, 1024); ; {
			n, err := c.Read(buf)
			seen.Write(buf[:n])
			if good != "" && strings.Contains(seen.String(), good) {
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
				good = ""
			}
			if err != nil {
				got <- seen.String()
				return
			}
		}
	}), got
}

// sendIn writes all at once, or the first octets one by one. A relay that has
// refused may reset what still comes.
func sendIn(c net.Conn, text string, pieces bool) {
	for n := min(100, len(text)); pieces && n > 0; n-- {
		if _, err := io.WriteString(c, text[:1]); err != nil {
			return
		}
		text = text[1:]
	}
	_, _ = io.WriteString(c, text)
}

// TestForgeriesOnAnyService: a service without HTTP policies is not told a lie
// either, and the refusal is recorded. In dry-run all passes and is recorded as well.
func TestForgeriesOnAnyService(t *testing.T) {
	for name, text := range forgeries {
		good := ""
		if name == "behind a good request" {
			good = "Host: x\r\n\r\n"
		}
		for _, pieces := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, in pieces %v", name, pieces), func(t *testing.T) { forgeryRefused(t, text, good, pieces) })
		}
		t.Run(name+", dry-run", func(t *testing.T) { forgeryPasses(t, text) })
	}
}

func forgeryRefused(t *testing.T, text, good string, pieces bool) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to, got := collector(t, b, good)
	c := a.dial(t, to)
	sendIn(c, text, pieces)
	answer, err := io.ReadAll(c)
	if err != nil || !strings.Contains(string(answer), "Connection: close") || !strings.Contains(string(answer), "Ringfence-Decision: ") {
		t.Errorf("answer %q, %v", answer, err)
	}
	if seen := <-got; strings.Contains(seen, "king") {
		t.Errorf("the service got %q", seen)
	}
	if n := b.relay.Stats().Malformed; n != 1 || !b.dec.Logged("ingress refuse: ") || !b.dec.Logged(": deny") {
		t.Errorf("%d counted as malformed, log = %q", n, b.dec.Log())
	}
}

func forgeryPasses(t *testing.T, text string) {
	a, b := pair(t, authz.DryRun, proxytest.Policy{}, proxytest.Policy{})
	to, got := collector(t, b, "")
	c := a.dial(t, to)
	sendIn(c, text, false)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if seen := <-got; len(answer) > 0 || err != nil || !strings.Contains(seen, "king") {
		t.Errorf("the client got %q (%v), the service %q", answer, err, seen)
	}
	if !b.dec.Logged("ingress refuse: ") || !b.dec.Logged(": would_deny") {
		t.Errorf("log = %q", b.dec.Log())
	}
}

// TestExtensionMethodInPieces: whatever the method and however it comes, an
// HTTP server is told its verified caller.
func TestExtensionMethodInPieces(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.web(t, "b/sa/web", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Method, r.Header.Values("X-Forwarded-Client-Cert"))
	})
	for _, method := range []string{"GET", "FOO", "get", "GETX"} {
		c := a.dial(t, to)
		sendIn(c, method+" / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"+forgery+"\r\n\r\n", true)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if got := string(body); err != nil || !strings.HasPrefix(got, method+"[") || strings.Contains(got, "king") || !strings.Contains(got, "sa/caller") {
			t.Errorf("%s: %q, %v", method, got, err)
		}
	}
}

// TestOddAnswerPasses: a service without HTTP policies may answer what it likes.
func TestOddAnswerPasses(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	var asked atomic.Int64
	to := b.service(t, "b/sa/radio", func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			asked.Add(1)
			_, _ = io.WriteString(c, "ICY 200 OK\r\nicy-name: x\r\n\r\nmusic")
		}
	})
	c := a.dial(t, to)
	send(t, c, "GET / HTTP/1.0\r\n\r\n")
	want(t, c, "ICY 200 OK\r\nicy-name: x\r\n\r\nmusic")
	if b.dec.Logged("refuse") {
		t.Errorf("log = %q", b.dec.Log())
	}
	send(t, c, "GET / HTTP/1.0\r\n"+forgery+"\r\n\r\n")
	wantEOF(t, c)
	if asked.Load() != 1 || !b.dec.Logged("request after a response that was not HTTP: deny") {
		t.Errorf("asked %d times, log = %q", asked.Load(), b.dec.Log())
	}
}

// TestModeOfLiveHTTP: a connection begun in dry-run is held to enforce once its
// scope is, and one that has slipped through is reset.
func TestModeOfLiveHTTP(t *testing.T) {
	bad := "GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n" + forgery + "\r\n\r\n"
	for name, policy := range map[string]proxytest.Policy{"any": {}, "HTTP only": {HTTPOnly: httpOnly}} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t, authz.DryRun, proxytest.Policy{}, policy)
			web := b.web(t, "b/sa/web", func(w http.ResponseWriter, r *http.Request) {
				fmt.Fprint(w, r.Header.Values("X-Forwarded-Client-Cert"))
			})
			live, slipped, foreign := a.dial(t, web), a.dial(t, b.service(t, "b/sa/echo", echo)), a.dial(t, b.service(t, "b/sa/echo2", echo))
			r := bufio.NewReader(live)
			get(t, live, r, "/")
			exchange(t, slipped, bad)
			if name == "any" {
				exchange(t, foreign, "PING\r\n")
			}
			b.scope.SetMode(authz.Enforce)
			wantReset(t, slipped)
			if name == "any" {
				exchange(t, foreign, "PING\r\n")
			}
			get(t, live, r, "/")
			send(t, live, bad)
			resp, err := http.ReadResponse(r, nil)
			// The server would refuse it as well, but not under a decision of ours.
			if err != nil || resp.StatusCode != http.StatusBadRequest || resp.Header.Get("Ringfence-Decision") == "" {
				t.Fatalf("%+v, %v", resp, err)
			}
			if body, _ := io.ReadAll(resp.Body); strings.Contains(string(body), "king") {
				t.Errorf("body %q", body)
			}
		})
	}
}
