package h1

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
)

const (
	getA   = "GET /a HTTP/1.1\r\nHost: a.test\r\n\r\n"
	getB   = "GET /b HTTP/1.1\r\nHost: a.test\r\n\r\n"
	getC   = "GET /c HTTP/1.1\r\nHost: a.test\r\n\r\n"
	ok     = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	denied = "HTTP/1.1 403 Forbidden\r\n"
)

// denyB refuses what has /b as its target.
func denyB(h *Head) Verdict {
	if h.Target == "/b" {
		return Verdict{Reply: Deny(403, "00112233445566778899aabb-2", "no policy permits it")}
	}
	return Verdict{Allow: true}
}

// answers parses what the client got with net/http, for requests of the given methods.
func (w *world) answers(methods ...string) (statuses []int) {
	w.t.Helper()
	r := bufio.NewReader(strings.NewReader(w.toClient.String()))
	for _, m := range methods {
		resp, err := http.ReadResponse(r, &http.Request{Method: m})
		if err != nil {
			w.t.Fatalf("answer %d: %v in %q", len(statuses)+1, err, w.toClient.String())
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			w.t.Errorf("answer %d: %v", len(statuses)+1, err)
		}
		statuses = append(statuses, resp.StatusCode)
	}
	if rest, _ := io.ReadAll(r); len(rest) > 0 {
		w.t.Errorf("after the answers: %q", rest)
	}
	return statuses
}

func wantStatuses(t *testing.T, got []int, want ...int) {
	t.Helper()
	for i := range want {
		if len(got) != len(want) || got[i] != want[i] {
			t.Fatalf("statuses %v, want %v", got, want)
		}
	}
}

func TestDenyKeepsTheConnection(t *testing.T) {
	for _, body := range []string{
		"",
		"Content-Length: 5\r\n\r\nhello",
		"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n",
	} {
		for _, chop := range []int{0, 1, 4} {
			w := newWorld(t, Config{})
			w.chop, w.decide = chop, denyB
			if body == "" {
				w.client(getB + getA)
			} else {
				w.client("POST /b HTTP/1.1\r\nHost: a.test\r\n" + body + getA)
			}
			w.wantServer(getA)
			w.server(ok)
			wantStatuses(t, w.answers("GET", "GET"), 403, 200)
			if w.closed || !w.conn.Idle() {
				t.Errorf("closed %v, idle %v", w.closed, w.conn.Idle())
			}
		}
	}
}

// TestDenyWaitsForEarlierResponses: a refusal must not overtake or split them.
func TestDenyWaitsForEarlierResponses(t *testing.T) {
	for _, chop := range []int{0, 1, 3} {
		w := newWorld(t, Config{})
		w.chop, w.decide = chop, denyB
		w.client(getA + getB + getB + getC + getB)
		w.wantServer(getA + getC)
		w.wantClient("")
		w.server("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\non")
		if got := w.toClient.String(); strings.Contains(got, denied) {
			t.Errorf("the refusal came inside the response: %q", got)
		}
		w.server("ce" + ok)
		got := w.toClient.String()
		w.toClient.Reset()
		w.toClient.WriteString(strings.TrimPrefix(got, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"))
		wantStatuses(t, w.answers("GET", "GET", "GET", "GET", "GET"), 200, 403, 403, 200, 403)
		if !w.conn.Idle() || len(w.responses) != 2 || w.responses[1] != "4:200" {
			t.Errorf("idle %v, responses %v", w.conn.Idle(), w.responses)
		}
	}
}

func TestDenyDocument(t *testing.T) {
	w := newWorld(t, Config{})
	w.decide = func(*Head) Verdict {
		return Verdict{Reply: Deny(401, "id-1\r\nX: y", "quote \" back \\ \x00 \xff <é>\r\n")}
	}
	w.client(getA)
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(w.toClient.String())), nil)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Title, Detail, Decision string
		Status                  int
	}
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil {
		t.Fatal(err)
	}
	if doc.Status != 401 || doc.Title != "Unauthorized" || doc.Detail != "quote \" back \\ \x00 \uFFFD <é>\r\n" {
		t.Errorf("document %+v", doc)
	}
	h := resp.Header
	if h.Get("Content-Type") != "application/problem+json" || h.Get(DecisionField) != "id-1X:y" || h.Get("Www-Authenticate") == "" || h.Get("X") != "" {
		t.Errorf("header %v", h)
	}
}

func TestDenyByVersionAndMethod(t *testing.T) {
	for _, c := range []struct {
		request string
		method  string
		line    string // of the reply
		closed  bool
	}{
		{"HEAD /b HTTP/1.1\r\nHost: a.test\r\n\r\n", "HEAD", "", false},
		{"GET /b HTTP/1.0\r\n\r\n", "GET", "Connection: close\r\n", true},
		{"GET /b HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "GET", "Connection: keep-alive\r\n", false},
		{"GET /b HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n", "GET", "Connection: close\r\n", true},
		{"POST /b HTTP/1.1\r\nHost: a.test\r\nContent-Length: 70000\r\n\r\n", "POST", "Connection: close\r\n", true},
		{"POST /b HTTP/1.1\r\nHost: a.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", "POST", "Connection: close\r\n", true},
		{"POST /b HTTP/1.1\r\nHost: a.test\r\nExpect: 100-continue\r\n\r\n", "POST", "", false},
	} {
		w := newWorld(t, Config{})
		w.decide = denyB
		w.client(c.request)
		wantStatuses(t, w.answers(c.method), 403)
		got := w.toClient.String()
		if w.closed != c.closed || !strings.Contains(got, c.line) || c.line == "" && strings.Contains(got, "Connection:") {
			t.Errorf("%q: closed %v, got %q", c.request, w.closed, got)
		}
		if w.toServer.Len() > 0 {
			t.Errorf("%q: the server got %q", c.request, w.toServer.String())
		}
		if c.closed {
			w.client(getA)
			w.wantServer("")
		}
	}
}

// TestDenySkipsSoMuch: a refused chunked body whose length nobody knows is
// skipped up to the bound, then the connection ends, behind what it is owed.
func TestDenySkipsSoMuch(t *testing.T) {
	const head = "POST /b HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, before := range []string{"", getA} {
		w := newWorld(t, Config{MaxSkip: 1000})
		w.decide = denyB
		w.client(before + head)
		for range 300 {
			w.client("5\r\nhello\r\n")
		}
		w.client("0\r\n\r\n" + getC)
		w.wantServer(before)
		if before == "" {
			wantStatuses(t, w.answers("POST"), 403)
		} else {
			w.server(ok)
			wantStatuses(t, w.answers("GET", "POST"), 200, 403)
		}
		if !w.closed {
			t.Error("the connection goes on")
		}
	}
}

func TestDenyBadChunksWhileSkipping(t *testing.T) {
	w := newWorld(t, Config{})
	w.decide = denyB
	w.client("POST /b HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + getA)
	wantStatuses(t, w.answers("POST"), 403)
	w.wantServer("")
	if !w.closed {
		t.Error("the connection goes on")
	}
}

// TestZeroVerdictRefuses: a handler that forgets to decide lets nothing pass.
func TestZeroVerdictRefuses(t *testing.T) {
	w := newWorld(t, Config{})
	w.decide = func(*Head) Verdict { return Verdict{} }
	w.client(getA)
	w.wantServer("")
	wantStatuses(t, w.answers("GET"), 403)
}

func TestReplyOfTheHandlersOwn(t *testing.T) {
	w := newWorld(t, Config{})
	w.decide = func(*Head) Verdict {
		return Verdict{Reply: &Reply{Status: 418, Phrase: "Short", Lines: []byte("A: b\r\n"), Body: []byte("tea"), Close: true}}
	}
	w.client(getA)
	w.wantClient("HTTP/1.1 418 Short\r\nContent-Length: 3\r\nConnection: close\r\nA: b\r\n\r\ntea")
	if !w.closed {
		t.Error("the connection goes on")
	}
}

// TestDenyAfterTheServerLeft: nothing can be said after the half-close.
func TestDenyAfterTheServerLeft(t *testing.T) {
	w := newWorld(t, Config{})
	w.decide = denyB
	w.serverFIN()
	w.client(getB)
	w.wantClient("")
	w.wantServer("")
}
