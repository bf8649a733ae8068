package h1

import (
	"strings"
	"testing"
)

// TestResponseFraming: each response is followed by another one, which is only
// found if the first ended where it should.
func TestResponseFraming(t *testing.T) {
	for _, c := range []struct{ name, request, response string }{
		{"length", getA, ok},
		{"length zero", getA, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
		{"chunked", getA, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;e=f\r\nhello\r\n0\r\nContent-Length: 9\r\nA: b\r\n\r\n"},
		{"head", "HEAD /a HTTP/1.1\r\nHost: a.test\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"},
		{"head chunked", "HEAD /a HTTP/1.1\r\nHost: a.test\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"204", getA, "HTTP/1.1 204 No Content\r\n\r\n"},
		{"204 with length", getA, "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"},
		{"304", getA, "HTTP/1.1 304 Not Modified\r\nContent-Length: 100\r\n\r\n"},
		{"304 chunked", getA, "HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"interim", getA, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + ok},
		{"no reason", getA, "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"},
		{"empty reason", getA, "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"},
		{"odd status", getA, "HTTP/1.1 799 Caf\xe9\tX\r\nContent-Length: 0\r\n\r\n"},
		{"http10 keep-alive", getA, "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"},
		{"connect refused", "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", "HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno"},
		{"upgrade ignored", "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", ok},
		{"host in a response", getA, "HTTP/1.1 200 OK\r\nHost: x\r\nHost: y\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n"},
	} {
		for _, chop := range []int{0, 1, 3} {
			w := newWorld(t, Config{})
			w.chop = chop
			w.client(c.request + getB)
			w.server(c.response) // apart, for what asks to switch holds the next request back
			w.server(ok)
			w.wantClient(c.response + ok)
			w.wantServer(c.request + getB)
			if len(w.refusals) > 0 || !w.conn.Idle() || len(w.responses) != 2 {
				t.Errorf("%s, chop %d: refusals %+v, responses %v, idle %v", c.name, chop, w.refusals, w.responses, w.conn.Idle())
			}
		}
	}
}

// liars are responses that nobody can frame, or that two readers frame differently.
var liars = map[string]string{
	"cl-te":            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
	"cl-twice":         "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
	"cl-list":          "HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
	"cl-negative":      "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
	"te-other":         "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
	"te-http10":        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
	"fold":             "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
	"bare-lf":          "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
	"leading-crlf":     "\r\nHTTP/1.1 200 OK\r\n\r\n",
	"not-http":         "SSH-2.0-x\r\n",
	"not-http-no-line": "hello",
	"icy":              "ICY 200 OK\r\n\r\n",
	"version":          "HTTP/2.0 200 OK\r\n\r\n",
	"status-short":     "HTTP/1.1 20 OK\r\n\r\n",
	"status-long":      "HTTP/1.1 2000 OK\r\n\r\n",
	"status-zero":      "HTTP/1.1 099 OK\r\n\r\n",
	"status-letters":   "HTTP/1.1 OK\r\n\r\n",
	"reason-null":      "HTTP/1.1 200 O\x00K\r\n\r\n",
	"101":              "HTTP/1.1 101 Switching Protocols\r\n\r\n",
	"space-colon":      "HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n",
	"too-large":        "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("b", 70000) + "\r\n\r\n",
	"too-many":         "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 1001) + "\r\n",
	"interim-first":    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nA\r\n\r\n",
}

func TestLyingServerGives502(t *testing.T) {
	for name, response := range liars {
		for _, chop := range []int{0, 1} {
			w := newWorld(t, Config{})
			w.chop = chop
			w.client(getA + getB)
			w.server(response + "rest" + ok)
			wantRefusal(t, w, 502)
			if strings.Contains(w.toClient.String(), "rest") || len(w.refusals) != 1 || !w.refusals[0].Upstream || w.refusals[0].Seq != 1 {
				t.Errorf("%s: refusals %+v, the client got %.300q", name, w.refusals, w.toClient.String())
			}
		}
	}
}

func TestLyingServerPassesInDryRun(t *testing.T) {
	for name, response := range liars {
		for _, mode := range []Mode{DryRun, Passive} {
			w := newWorld(t, Config{Mode: mode})
			w.client(getA + getB)
			w.server(response + "rest")
			w.wantClient(response + "rest")
			w.client("anything")
			w.wantServer(getA + getB + "anything")
			if len(w.refusals) != 1 || !w.conn.Opaque() || !w.conn.Lax() {
				t.Errorf("%s: refusals %+v, opaque %v", name, w.refusals, w.conn.Opaque())
			}
		}
	}
}

// TestLyingServerIsHeardInObserve: its answer passes, whatever it is, and no request follows.
func TestLyingServerIsHeardInObserve(t *testing.T) {
	for name, response := range liars {
		for _, chop := range []int{0, 1} {
			w := newWorld(t, Config{Mode: Observe})
			w.chop = chop
			w.client("POST /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9\r\n\r\npart")
			w.server(response + "rest")
			w.client(" rest")
			w.server("more")
			w.wantClient(response + "restmore")
			w.wantServer("POST /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 9\r\n\r\npart rest")
			if w.closed || w.conn.Idle() || w.conn.Opaque() || len(w.refusals) > 0 {
				t.Errorf("%s: closed %v, idle %v, refusals %+v", name, w.closed, w.conn.Idle(), w.refusals)
			}
			sent := w.toServer.String()
			w.client(getB)
			w.wantServer(sent)
			if !w.closed || len(w.refusals) != 1 || !w.refusals[0].Upstream {
				t.Errorf("%s: closed %v, refusals %+v", name, w.closed, w.refusals)
			}
		}
	}
}

func TestLyingServerEndsInObserve(t *testing.T) {
	for _, response := range []string{"ICY 200 OK\r\nstream", "HTTP/1.1 200 OK\r\nContent-"} {
		w := newWorld(t, Config{Mode: Observe})
		w.client(getA)
		w.server(response)
		w.serverFIN()
		w.wantClient(response)
		if !w.clientEOF || w.closed || len(w.refusals) > 0 {
			t.Errorf("%q: FIN %v, closed %v, refusals %+v", response, w.clientEOF, w.closed, w.refusals)
		}
	}
}

// TestBadBodyBehindAFreeAnswer: a reply of ours must not land inside of it.
func TestBadBodyBehindAFreeAnswer(t *testing.T) {
	w := newWorld(t, Config{Mode: Observe})
	w.client("POST /a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n")
	w.server("hello")
	w.client("zz\r\n")
	w.wantClient("hello")
	if !w.closed || len(w.refusals) != 1 {
		t.Errorf("closed %v, refusals %+v", w.closed, w.refusals)
	}
}

// TestTimeoutIsHeardInObserve: a server may give up on a request that never comes.
func TestTimeoutIsHeardInObserve(t *testing.T) {
	const timeout = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
	for _, begun := range []string{"", "GET /b HT", "GET /b HTTP/1.1\r\nHo"} {
		w := newWorld(t, Config{Mode: Observe})
		w.client(getA)
		w.server(ok)
		w.client(begun)
		w.server(timeout)
		w.wantClient(ok + timeout)
		w.client("st: a.test\r\nX-Forwarded-Client-Cert: forged\r\n\r\n")
		w.wantServer(getA)
		if !w.closed || len(w.refusals) != 1 {
			t.Errorf("%q: closed %v, refusals %+v", begun, w.closed, w.refusals)
		}
	}
}

// TestLyingServerIsCut: when part of the response has left, nothing true can be said.
func TestLyingServerIsCut(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, body := range []string{"5\r\nhelloX\r\n", "zz\r\n", "1\nx\r\n", "0\r\nA : b\r\n\r\n"} {
		w := newWorld(t, Config{})
		w.client(getA)
		w.server(head)
		w.server(body)
		if w.cut == nil || w.cut.Error() == "" || w.closed {
			t.Errorf("%q: cut %v, closed %v", body, w.cut, w.closed)
		}
		if !strings.HasPrefix(head+body, w.toClient.String()) {
			t.Errorf("the client got %q", w.toClient.String())
		}
		var out Out
		if n, err := w.conn.Downstream([]byte(getA), false, &out); err == nil || n != len(getA) || len(out.Forward) > 0 {
			t.Errorf("a step after the cut: %d, %v", n, err)
		}
	}
}

// TestUnsolicitedResponse: one that comes ahead of its request would be taken
// for the answer to the next one.
func TestUnsolicitedResponse(t *testing.T) {
	for _, before := range []string{"", getA} {
		w := newWorld(t, Config{})
		want := ""
		if before != "" {
			w.client(before)
			w.server(ok)
			want = ok
		}
		w.server("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
		w.client(getB)
		w.wantClient(want)
		w.wantServer(before)
		if !w.closed || len(w.refusals) != 1 || w.refusals[0].Seq != 0 {
			t.Errorf("closed %v, refusals %+v", w.closed, w.refusals)
		}
	}
}

func TestResponseSplitInsideAnother(t *testing.T) {
	w := newWorld(t, Config{})
	w.client(getA)
	w.server(ok + ok)
	w.wantClient(ok)
	if !w.closed {
		t.Error("two responses to one request")
	}
}
