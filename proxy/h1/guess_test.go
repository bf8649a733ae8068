package h1

import (
	"strings"
	"testing"
)

func TestServerFirst(t *testing.T) {
	for mode, refusals := range map[Mode]int{Observe: 0, Passive: 0, DryRun: 1} {
		for _, first := range []string{"", "GE", "FOO /x HTTP/1.1", "\r\n"} {
			w := newWorld(t, Config{Mode: mode})
			w.client(first)
			w.server("220 mail.test ESMTP\r\n")
			w.wantClient("220 mail.test ESMTP\r\n")
			w.wantServer(first)
			w.client("HLO\r\n")
			w.wantServer(first + "HLO\r\n")
			if !w.conn.Opaque() || len(w.refusals) < refusals || refusals == 0 && (len(w.refusals) > 0 || w.conn.Lax()) {
				t.Errorf("mode %d, %q: opaque %v, refusals %+v", mode, first, w.conn.Opaque(), w.refusals)
			}
		}
	}
}

// TestHoldsNothingElse: the octet that rules out a registered method's line
// releases all, and the one that rules out any request line makes it opaque.
func TestHoldsNothingElse(t *testing.T) {
	for _, c := range []struct{ held, releases, rulesOut string }{
		{"", "\x16", ""}, {"", "\x00", ""}, {"", "{", ""}, {"", "*", "1\r\n"}, {"", "\r", "\n\x00"}, {"", "g", "et key\r\n"}, {"", "Z", "\n"},
		{"GE", "X", "\n"}, {"GE", "\x00", ""}, {"GET", "\r", "\n"}, {"GET", "S", " x\r\n"}, {"GET ", "\r", "\nx\n"}, {"GET ", " ", " x\n\n"},
		{"PUT /x", "\x00", " RTSP/1.0\n"}, {"CONNECT {\"a\":1}", "\r", "\n\r\n"}, {"P", "I", "NG\r\n"}, {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", "\n", ""},
		{"GET key", "\r", "\n{"}, {"GET / ", "R", "TSP/1.0\r\n"}, {"GET / HTTP/1.1", " ", "x\r\n"}, {"UPDATEREDIRECTREF", "X", "\r\n"},
		{"GET / HTTP/1.1\r", "x", ""}, // refused
	} {
		for _, mode := range []Mode{Observe, Passive} {
			w := newWorld(t, Config{Mode: mode})
			for i := range len(c.held) {
				w.client(c.held[i : i+1])
			}
			w.wantServer("")
			w.client(c.releases)
			if strings.HasSuffix(c.held, "HTTP/1.1\r") {
				if len(w.refusals) != 1 {
					t.Errorf("%q: refusals %+v", c.held, w.refusals)
				}
				continue
			}
			w.wantServer(c.held + c.releases)
			if w.conn.Opaque() != (c.rulesOut == "") {
				t.Errorf("%q then %q: opaque %v", c.held, c.releases, w.conn.Opaque())
			}
			for i := range len(c.rulesOut) {
				w.client(c.rulesOut[i : i+1])
			}
			w.wantServer(c.held + c.releases + c.rulesOut)
			if !w.conn.Opaque() || w.conn.Lax() || len(w.refusals) > 0 {
				t.Errorf("%q then %q: opaque %v, refusals %+v", c.held, c.releases+c.rulesOut, w.conn.Opaque(), w.refusals)
			}
		}
	}
}

const forged = "X-Forwarded-Client-Cert: forged\r\n"

// TestExtensionMethodInPieces: the first line has passed before it was known
// for a request's, and the rest of the head is filtered all the same.
func TestExtensionMethodInPieces(t *testing.T) {
	const line, rest = "FOO /x HTTP/1.1\r\n", "Host: A.test\r\n" + forged + "Transfer-Encoding: chunked\r\nUpgrade: h2c\r\n\r\n"
	const body = "5\r\nhello\r\n0\r\n" + forged + "\r\n"
	want := line + "X-N: 1\r\nHost: A.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
	for _, mode := range []Mode{Observe, Passive} {
		for split := range len(line) + len(rest) {
			w := newWorld(t, Config{Mode: mode, Strip: NewNames(IdentityFields()...)})
			w.decide = func(h *Head) Verdict {
				if h.Method != "FOO" || h.Target != "/x" || h.Host != "a.test" || h.Seq != 1 || string(h.Raw()) != line+rest {
					t.Errorf("split at %d: head %+v", split, h)
				}
				return Verdict{Allow: true, Add: []byte("X-N: 1\r\n")}
			}
			all := line + rest + body
			w.client(all[:split])
			if held := len(line) <= split; (w.toServer.Len() == 0) != (held || split == 0) {
				t.Errorf("split at %d: the server got %q", split, w.toServer.String())
			}
			w.client(all[split:])
			w.wantServer(want)
			w.server(ok)
			w.wantClient(ok)
			if !w.conn.Idle() || len(w.refusals) > 0 || len(w.requests) != 1 {
				t.Errorf("split at %d: idle %v, refusals %+v", split, w.conn.Idle(), w.refusals)
			}
		}
	}
}

// TestDenyInPieces: the server has the first line, so nothing may come behind it.
func TestDenyInPieces(t *testing.T) {
	w := newWorld(t, Config{Mode: Observe})
	w.chop, w.decide = 1, denyB
	w.client("FOO /b HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\nabc" + getA)
	w.wantServer("FOO /b HTTP/1.1\r\n")
	wantStatuses(t, w.answers("FOO"), 403)
	if !w.closed {
		t.Error("the connection goes on")
	}
}

// TestLongFirstLines: what is too long for a head is refused if it ends as a
// request line, and passes if it is too long for any server.
func TestLongFirstLines(t *testing.T) {
	for n, refused := range map[int]bool{100 << 10: true, 1000 << 10: true, 1100 << 10: false} {
		for _, method := range []string{"GET", "FOO"} {
			w := newWorld(t, Config{Mode: Observe})
			w.chop = 4 << 10
			w.client(method + " /" + strings.Repeat("x", n))
			if len(w.conn.down.sent) > DefaultMaxHead {
				t.Errorf("%d octets kept", len(w.conn.down.sent))
			}
			w.client(" HTTP/1.1\r\n" + forged + "\r\n")
			if strings.Contains(w.toServer.String(), "forged") == refused || w.conn.Opaque() == refused {
				t.Errorf("%s of %d octets: opaque %v, refusals %+v", method, n, w.conn.Opaque(), w.refusals)
			}
			if refused {
				wantRefusal(t, w, 431)
			}
		}
	}
}

func TestIncompleteInPieces(t *testing.T) {
	for mode, closed := range map[Mode]bool{Observe: true, Passive: false} {
		w := newWorld(t, Config{Mode: mode})
		w.chop = 1
		w.client("FOO / HTTP/1.1\r\nHost:")
		w.clientFIN()
		w.clientFIN()
		if w.closed != closed || len(w.refusals) != 1 || w.conn.Lax() == closed {
			t.Errorf("mode %d: closed %v, refusals %+v", mode, w.closed, w.refusals)
		}
	}
}

// TestBehindAProxyHeader: what a balancer sends for its client is HTTP as well.
func TestBehindAProxyHeader(t *testing.T) {
	const v2 = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x00\x01\x00\x50"
	const request, passes = "FOO / HTTP/1.1\r\nHost: a.test\r\n" + forged + "\r\n", "FOO / HTTP/1.1\r\nHost: a.test\r\n\r\n"
	for _, header := range []string{"PROXY TCP4 192.0.2.1 192.0.2.2 1 80\r\n", "PROXY UNKNOWN\r\n", v2, "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00", v2 + "PROXY UNKNOWN\r\n"} {
		for split := range len(header + request) {
			for _, mode := range []Mode{Observe, Passive} {
				w := newWorld(t, Config{Mode: mode, Strip: NewNames(IdentityFields()...)})
				w.client((header + request)[:split])
				w.client((header + request)[split:])
				w.wantServer(header + passes)
				if len(w.requests) != 1 || w.conn.Opaque() || len(w.refusals) > 0 {
					t.Errorf("%q split at %d: requests %q, opaque %v", header, split, w.requests, w.conn.Opaque())
				}
			}
		}
		w := newWorld(t, Config{Mode: Observe, Strip: NewNames(IdentityFields()...)})
		w.chop = 1
		w.client(header + "GET / HTTP/1.1\nHost: a.test\n" + forged + "\n")
		w.wantServer(header)
		wantRefusal(t, w, 400)
		w = newWorld(t, Config{Mode: Observe})
		w.chop = 1
		w.client(header + "PING\r\n")
		w.wantServer(header + "PING\r\n")
		if !w.conn.Opaque() || len(w.refusals) > 0 {
			t.Errorf("%q: opaque %v, refusals %+v", header, w.conn.Opaque(), w.refusals)
		}
	}
}

// TestAlmostAProxyHeader is opaque.
func TestAlmostAProxyHeader(t *testing.T) {
	for _, text := range []string{"\r\n\r\n\x00\r\nQUITE" + getA, "\r\n\r\n\x00", "PROXY\r\n" + getA, "PROXY " + strings.Repeat("x", 110) + "\r\n" + getA, "PROXY \x00\r" + getA} {
		for _, chop := range []int{0, 1} {
			w := newWorld(t, Config{Mode: Observe})
			w.chop = chop
			w.client(text)
			w.clientFIN()
			w.wantServer(text)
			if len(w.requests) > 0 || len(w.refusals) > 0 || !w.serverEOF {
				t.Errorf("%q: requests %q, refusals %+v", text, w.requests, w.refusals)
			}
		}
	}
}

// TestPass: a handler may find that nothing is to be refused here.
func TestPass(t *testing.T) {
	for _, mode := range []Mode{Enforce, Observe, Passive} {
		const bad = "GET / HTTP/1.1\r\nHost: a.test\r\nA : b\r\n\r\nand more"
		w := newWorld(t, Config{Mode: mode})
		w.pass = true
		w.client(getA + bad)
		w.server(ok)
		w.wantServer(getA + bad)
		w.wantClient(ok)
		if !w.conn.Opaque() || w.conn.Lax() != (mode == Passive) || len(w.refusals) != 1 {
			t.Errorf("mode %d: opaque %v, lax %v, refusals %+v", mode, w.conn.Opaque(), w.conn.Lax(), w.refusals)
		}
	}
}

// TestUpgradeInObserve: any protocol may be upgraded to but HTTP/2, and what
// follows is a request again if the server does not.
func TestUpgradeInObserve(t *testing.T) {
	ask := strings.Replace(askUpgrade, "websocket", "TLS/1.0", 1)
	w := newWorld(t, Config{Mode: Observe, Strip: NewNames(IdentityFields()...)})
	w.client(ask)
	w.server(ok)
	w.client("GET / HTTP/1.1\r\nHost: a\r\n" + forged + "\r\n")
	w.server(ok)
	w.wantServer(ask + "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	w.client(ask)
	w.server(strings.Replace(switching, "websocket", "TLS/1.0", 1))
	if !w.conn.Opaque() || w.conn.Lax() {
		t.Errorf("opaque %v, lax %v", w.conn.Opaque(), w.conn.Lax())
	}
}

// TestConfigure: a live connection is held to the mode that it is in now.
func TestConfigure(t *testing.T) {
	const bad = "GET /b HTTP/1.1\r\nHost: a.test\r\n X: y\r\n\r\n"
	for _, c := range [][2]Mode{{DryRun, Enforce}, {Passive, Observe}} {
		w := newWorld(t, Config{Mode: c[0]})
		w.client(getA)
		w.server(ok)
		w.conn.Configure(&Config{Mode: c[1]})
		w.client(bad)
		w.wantServer(getA)
		wantRefusal(t, w, 400)
		if w.conn.Lax() {
			t.Error("lax")
		}
		w = newWorld(t, Config{Mode: c[1]})
		w.client(getA)
		w.server(ok)
		w.conn.Configure(&Config{Mode: c[0]})
		w.client(bad)
		w.wantServer(getA + bad)
		if !w.conn.Lax() || len(w.refusals) != 1 {
			t.Errorf("lax %v, refusals %+v", w.conn.Lax(), w.refusals)
		}
	}
}
