package h1

import (
	"strconv"
	"strings"
	"testing"
	"unsafe"
)

const (
	askUpgrade = "GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	switching  = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
	askConnect = "CONNECT db.test:5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n"
)

func TestUpgradeBecomesOpaque(t *testing.T) {
	for _, c := range [][2]string{{askUpgrade, switching}, {askConnect, "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"}} {
		for _, chop := range []int{0, 1} {
			w := newWorld(t, Config{})
			w.chop = chop
			w.client(getA + c[0] + "\x81early\r\n")
			w.wantServer(getA + c[0]) // what follows waits for the answer
			w.server(ok + c[1] + "\x00server")
			w.wantServer(getA + c[0] + "\x81early\r\n")
			w.wantClient(ok + c[1] + "\x00server")
			w.client("\x16\x03 anything\n\n")
			w.server("goes")
			w.clientFIN()
			w.serverFIN()
			w.wantServer(getA + c[0] + "\x81early\r\n\x16\x03 anything\n\n")
			if !w.conn.Opaque() || !w.serverEOF || !w.clientEOF || w.closed || len(w.refusals) > 0 {
				t.Errorf("opaque %v, FIN %v %v, refusals %+v", w.conn.Opaque(), w.serverEOF, w.clientEOF, w.refusals)
			}
		}
	}
}

// TestUpgradeRefusedGoesOnAsHTTP: bytes behind the request are requests after all.
func TestUpgradeRefusedGoesOnAsHTTP(t *testing.T) {
	for _, ask := range []string{askUpgrade, askConnect} {
		w := newWorld(t, Config{})
		w.decide = denyB
		w.client(ask + getB + getC)
		w.wantServer(ask)
		w.server("HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n")
		w.wantServer(ask + getC)
		w.server(ok)
		if len(w.requests) != 3 || !w.conn.Idle() || strings.Count(w.toClient.String(), denied) != 1 {
			t.Errorf("requests %q, client %q", w.requests, w.toClient.String())
		}
	}
}

// A handler that answers 200 to anything, CONNECT included, would take what
// follows for requests: on a service whose every request is decided, CONNECT needs
// to be asked for in the configuration.
func TestConnectIsRefusedUnlessConfigured(t *testing.T) {
	for _, mode := range []Mode{Enforce, DryRun} {
		w := newWorld(t, Config{Mode: mode, Upgrades: websocket})
		w.client(askConnect + getA)
		if len(w.refusals) != 1 || mode == Enforce && w.toServer.Len() > 0 {
			t.Errorf("mode %d: refusals %+v, the server got %q", mode, w.refusals, w.toServer.String())
		}
	}
}

func TestUpgradesAreConfigured(t *testing.T) {
	ask := strings.Replace(askUpgrade, "websocket", "TCP", 1)
	w := newWorld(t, Config{Upgrades: []string{"tcp"}})
	w.client(ask)
	w.server(strings.Replace(switching, "websocket", "tcp", 1) + "raw")
	if !w.conn.Opaque() || len(w.refusals) > 0 {
		t.Errorf("opaque %v, refusals %+v", w.conn.Opaque(), w.refusals)
	}
	w = newWorld(t, Config{Upgrades: []string{}})
	w.client(askUpgrade)
	w.wantServer("")
	wantRefusal(t, w, 400)
}

// TestPipelineIsBounded: past MaxOutstanding the client is held, and goes on as
// responses come.
func TestPipelineIsBounded(t *testing.T) {
	const n = 3 * MaxOutstanding
	w := newWorld(t, Config{})
	w.client(strings.Repeat(getA, n))
	w.wantServer(strings.Repeat(getA, MaxOutstanding))
	if w.conn.Outstanding() != MaxOutstanding || w.conn.Idle() {
		t.Errorf("%d outstanding", w.conn.Outstanding())
	}
	for range n {
		w.server(ok)
	}
	w.wantServer(strings.Repeat(getA, n))
	w.wantClient(strings.Repeat(ok, n))
	if !w.conn.Idle() {
		t.Error("not idle")
	}
}

func TestPipelineOfRefusalsIsBounded(t *testing.T) {
	w := newWorld(t, Config{})
	w.decide = denyB
	w.client(getA + strings.Repeat(getB, 100) + getC)
	if w.conn.Outstanding() != MaxOutstanding {
		t.Errorf("%d outstanding", w.conn.Outstanding())
	}
	w.server(ok)
	w.wantServer(getA + getC)
	w.server(ok)
	if strings.Count(w.toClient.String(), denied) != 100 || !w.conn.Idle() {
		t.Errorf("idle %v, client got %d octets", w.conn.Idle(), w.toClient.Len())
	}
}

// TestHalfClose passes in both directions, between and within messages.
func TestHalfClose(t *testing.T) {
	w := newWorld(t, Config{})
	w.client(getA)
	w.clientFIN()
	if !w.serverEOF {
		t.Error("the client's FIN did not pass")
	}
	w.server(ok)
	w.serverFIN()
	w.wantClient(ok)
	if !w.clientEOF || w.closed || len(w.refusals) > 0 {
		t.Errorf("FIN %v, closed %v, refusals %+v", w.clientEOF, w.closed, w.refusals)
	}
}

func TestEOFFramedResponse(t *testing.T) {
	for _, head := range []string{"HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"} {
		w := newWorld(t, Config{})
		w.decide = denyB
		w.client(getA + getB)
		w.server(head)
		w.server("any octets\r\nHTTP/1.1 200 OK\r\n\r\n")
		w.serverFIN()
		w.wantClient(head + "any octets\r\nHTTP/1.1 200 OK\r\n\r\n")
		if !w.clientEOF || w.closed || len(w.refusals) > 0 {
			t.Errorf("FIN %v, closed %v, refusals %+v", w.clientEOF, w.closed, w.refusals)
		}
	}
}

// TestServerEOF: what a direct client would have seen, it sees.
func TestServerEOF(t *testing.T) {
	for _, part := range []string{"", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe"} {
		w := newWorld(t, Config{})
		w.client(getA)
		w.server(part)
		w.serverFIN()
		w.wantClient(part)
		if !w.clientEOF || w.closed || len(w.refusals) > 0 {
			t.Errorf("%q: FIN %v, closed %v, refusals %+v", part, w.clientEOF, w.closed, w.refusals)
		}
	}
	w := newWorld(t, Config{})
	w.client(getA)
	w.server("HTTP/1.1 200 OK\r\nContent-")
	w.serverFIN()
	wantRefusal(t, w, 502)
}

// TestServerCloses: after Connection: close nothing is answered any more.
func TestServerCloses(t *testing.T) {
	w := newWorld(t, Config{})
	w.decide = denyB
	const last = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
	w.client(getA + getB)
	w.server(last)
	w.client(getB + getC)
	w.wantServer(getA)
	w.serverFIN()
	w.wantClient(last)
	if !w.closed {
		t.Error("the connection goes on")
	}
}

// TestEarlyResponse: a server may answer before the body is complete; the body
// goes on to it, whatever it looks like, and the next request is found behind it.
func TestEarlyResponse(t *testing.T) {
	head := "POST /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: " + strconv.Itoa(5+len(getB)) + "\r\n\r\n"
	w := newWorld(t, Config{})
	w.client(head + "hello")
	w.server(ok)
	w.client(getB + getC)
	w.wantServer(head + "hello" + getB + getC)
	w.server(ok)
	w.wantClient(ok + ok)
	if len(w.requests) != 2 || !w.conn.Idle() {
		t.Errorf("requests %q, idle %v", w.requests, w.conn.Idle())
	}
}

func TestBadBodyAfterEarlyResponse(t *testing.T) {
	const post = "POST /a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
	w := newWorld(t, Config{})
	w.client(post + "5\r\nhello\r\n")
	w.server(ok)
	w.client("zz\r\n")
	w.wantClient(ok)
	if !w.closed || len(w.refusals) != 1 {
		t.Errorf("closed %v, refusals %+v", w.closed, w.refusals)
	}
}

// TestBadBodyWhileAnswered: part of the response has left, so the connection is cut.
func TestBadBodyWhileAnswered(t *testing.T) {
	w := newWorld(t, Config{})
	w.client("POST /a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n")
	w.server("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")
	w.client("zz\r\n")
	if w.cut == nil {
		t.Error("the connection goes on")
	}
}

func TestBadBodyBehindOthers(t *testing.T) {
	w := newWorld(t, Config{})
	w.client(getA + "HEAD /h HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
	w.wantClient("")
	w.server(ok + ok)
	got := strings.TrimPrefix(w.toClient.String(), ok)
	if !strings.HasPrefix(got, "HTTP/1.1 400 ") || !strings.HasSuffix(got, "\r\n\r\n") || !w.closed {
		t.Errorf("closed %v, the client got %q", w.closed, got)
	}
}

func TestExpectContinuePasses(t *testing.T) {
	const head = "POST /a HTTP/1.1\r\nHost: a.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
	w := newWorld(t, Config{})
	w.client(head)
	w.wantServer(head)
	w.server("HTTP/1.1 100 Continue\r\n\r\n")
	w.wantClient("HTTP/1.1 100 Continue\r\n\r\n")
	w.client("hello" + getA)
	w.server(ok + ok)
	if !w.conn.Idle() || len(w.requests) != 2 {
		t.Errorf("idle %v, requests %q", w.conn.Idle(), w.requests)
	}
}

func TestIncompleteRequestAtEOF(t *testing.T) {
	w := newWorld(t, Config{})
	w.client("GET / HTTP/1.1\r\nHost:")
	w.clientFIN()
	wantRefusal(t, w, 400)
	w.wantServer("")
}

// TestEveryOctetOfALine walks every octet through the early look at a line
// and through the whole parse, which must agree.
func TestEveryOctetOfALine(t *testing.T) {
	for c := range 256 {
		line := "GET /" + string([]byte{byte(c)}) + " HTTP/1.1\r\nHost: a\r\n\r\n"
		whole, pieces := newWorld(t, Config{}), newWorld(t, Config{})
		pieces.chop = 1
		whole.client(line)
		pieces.client(line)
		good := c > 0x20 && c < 0x7f && c != '#'
		if len(whole.requests) != len(pieces.requests) || (len(whole.requests) == 1) != good {
			t.Errorf("octet %#x: %d whole, %d in pieces", c, len(whole.requests), len(pieces.requests))
		}
	}
}

func TestValidValueByWords(t *testing.T) {
	for c := range 256 {
		for at := range 17 {
			b := []byte(strings.Repeat("v", 17))
			b[at] = byte(c)
			if validValue(b) != plainValue(b) {
				t.Errorf("octet %#x at %d", c, at)
			}
		}
	}
}

// TestNoIdleWakes: a response wakes the client's half only if it was held.
func TestNoIdleWakes(t *testing.T) {
	c := New(&Config{}, &plain{})
	var out Out
	if n, _ := c.Downstream([]byte(getA+"GET /incomplete"), false, &out); n != len(getA) || !out.NeedMore {
		t.Fatalf("took %d, NeedMore %v", n, out.NeedMore)
	}
	if _, err := c.Upstream([]byte(ok), false, &out); err != nil || out.Wake {
		t.Errorf("Wake %v, %v", out.Wake, err)
	}
}

// TestConnIsSmall: an idle connection is to cost little.
func TestConnIsSmall(t *testing.T) {
	if size := unsafe.Sizeof(Conn{}); size > 640 {
		t.Errorf("a Conn takes %d octets", size)
	}
}
