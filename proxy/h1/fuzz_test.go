package h1

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"
)

// seen is one message as the filter or net/http understood it.
type seen struct {
	method, target, host string
	length               int64 // -1 chunked
	start                int   // its offset in what was forwarded
}

// FuzzRequests holds the filter against net/http: of what it lets through,
// net/http must see the same requests, in the same places, or refuse; and how
// the octets were cut into pieces must not matter.
func FuzzRequests(f *testing.F) {
	for _, c := range corpus(f) {
		f.Add([]byte(c.data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4096 {
			return
		}
		w, ours := requestsOf(t, data, 1, Enforce)
		for _, chop := range []int{0, 7} {
			other, also := requestsOf(t, data, chop, Enforce)
			if len(also) != len(ours) || len(other.refusals) != len(w.refusals) || other.toServer.String() != w.toServer.String() {
				t.Fatalf("in pieces of %d: %d requests, %+v, %q\nof 1: %d requests, %+v, %q", chop,
					len(also), other.refusals, other.toServer.String(), len(ours), w.refusals, w.toServer.String())
			}
		}
		compareRequests(t, w.toServer.String(), ours)
		checkDryRun(t, data)
		checkObserve(t, data)
	})
}

// requestsOf lets everything pass. The offsets are right for pieces of one octet only.
func requestsOf(t *testing.T, data []byte, chop int, mode Mode) (w *world, ours []seen) {
	w = newWorld(t, Config{Mode: mode, Strip: NewNames(IdentityFields()...)})
	w.chop = chop
	w.decide = func(h *Head) Verdict {
		ours = append(ours, seen{strings.Clone(h.Method), strings.Clone(h.Target), strings.Clone(h.Host), h.ContentLength, w.toServer.Len()})
		return Verdict{Allow: true}
	}
	w.client(string(data))
	w.clientFIN()
	return w, ours
}

// countedReader tells how much of a stream a bufio.Reader's user has used.
type countedReader struct {
	r    io.Reader
	read int
}

func (c *countedReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.read += n
	return n, err
}

func compareRequests(t *testing.T, forwarded string, ours []seen) {
	t.Helper()
	stream := &countedReader{r: strings.NewReader(forwarded)}
	r := bufio.NewReader(stream)
	for i := 0; ; i++ {
		start := stream.read - r.Buffered()
		req, err := http.ReadRequest(r)
		if err != nil {
			return // net/http is stricter here, or it is the end
		}
		if i >= len(ours) {
			t.Fatalf("net/http sees request %d, %s %s, that nobody decided, in %q", i+1, req.Method, req.RequestURI, forwarded)
		}
		want := ours[i]
		got := seen{req.Method, req.RequestURI, strings.ToLower(strings.TrimSuffix(req.Host, ":")), req.ContentLength, start}
		if got != want {
			t.Fatalf("request %d: net/http sees %+v, we saw %+v in %q", i+1, got, want, forwarded)
		}
		_, err = io.Copy(io.Discard, req.Body)
		wantNotForged(t, req, forwarded)
		if err != nil {
			return
		}
	}
}

func containsField(h http.Header, match func(string, []string) bool) bool {
	for name, values := range h {
		if match(name, values) {
			return true
		}
	}
	return false
}

func checkDryRun(t *testing.T, data []byte) {
	t.Helper()
	for _, mode := range []Mode{DryRun, Passive} {
		w := newWorld(t, Config{Mode: mode})
		w.chop = 3
		w.client(string(data))
		w.clientFIN()
		got := w.toServer.String()
		hides := strings.Contains(strings.ToLower(string(data)), "upgrade") || strings.Contains(strings.ToLower(string(data)), "settings")
		held := w.conn.Outstanding() > 0 && len(w.fromClient) > 0 // behind an upgrade, or too many requests
		if w.toClient.Len() > 0 || w.closed || w.serverEOF == held {
			t.Fatalf("mode %d refused: %q, closed %v, FIN %v", mode, w.toClient.String(), w.closed, w.serverEOF)
		}
		if got != string(data) && !hides && !held {
			t.Fatalf("mode %d changed %q to %q", mode, data, got)
		}
	}
}

// checkObserve: a server that finds requests in what passed finds those that
// were decided, without forged fields, however the octets came; and Passive
// sees what Observe refuses.
func checkObserve(t *testing.T, data []byte) {
	t.Helper()
	reported := -1
	for _, mode := range []Mode{Observe, Passive} {
		for _, chop := range []int{0, 1, 5} {
			w, ours := requestsOf(t, data, chop, mode)
			if n := len(w.refusals); reported >= 0 && n != reported {
				t.Fatalf("mode %d in pieces of %d: refusals %+v, else %d", mode, chop, w.refusals, reported)
			}
			reported = len(w.refusals)
			switch got := w.toServer.String(); {
			case mode == Observe && chop == 1 && !w.conn.Opaque():
				if len(ours) > 0 {
					ours[0].start = 0 // its first line may have passed before
				}
				compareRequests(t, got, ours)
			case mode == Observe:
				neverForged(t, got)
			}
			if mode == Observe && w.conn.Lax() {
				t.Fatal("lax")
			}
		}
	}
}

// neverForged reads as a server does.
func neverForged(t *testing.T, forwarded string) {
	t.Helper()
	r := bufio.NewReader(strings.NewReader(forwarded))
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		_, err = io.Copy(io.Discard, req.Body)
		wantNotForged(t, req, forwarded)
		if err != nil {
			return
		}
	}
}

func wantNotForged(t *testing.T, req *http.Request, forwarded string) {
	t.Helper()
	forged := func(name string, _ []string) bool { return NewNames(IdentityFields()...).Has([]byte(name)) }
	if containsField(req.Header, forged) || containsField(req.Trailer, forged) {
		t.Fatalf("a forged field passed in %q", forwarded)
	}
}

// FuzzResponses does the same for responses, to three requests. The bits of
// the first argument say which of them are HEAD.
func FuzzResponses(f *testing.F) {
	for _, l := range liars {
		f.Add(byte(0), []byte(l[:min(len(l), 4000)]))
		f.Add(byte(2), []byte(ok+l[:min(len(l), 4000)]))
	}
	f.Add(byte(5), []byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"+ok+"HTTP/1.1 304 X\r\nContent-Length: 3\r\n\r\n"))
	f.Add(byte(0), []byte("HTTP/1.1 103 X\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a\r\nhello\r\n0\r\nA: b\r\n\r\n"+ok+ok))
	f.Add(byte(0), []byte("HTTP/1.0 200 OK\r\n\r\n"+ok))
	f.Fuzz(func(t *testing.T, heads byte, data []byte) {
		if len(data) > 4096 {
			return
		}
		var methods []string
		var requests strings.Builder
		for i := range 3 {
			methods = append(methods, []string{"GET", "HEAD"}[heads>>i&1])
			requests.WriteString(methods[i] + " / HTTP/1.1\r\nHost: a\r\n\r\n")
		}
		w, ours := responsesOf(t, requests.String(), data, 1)
		for _, chop := range []int{0, 7} {
			other, also := responsesOf(t, requests.String(), data, chop)
			if len(ours) != len(also) || (other.cut == nil) != (w.cut == nil) || other.closed != w.closed || len(other.refusals) != len(w.refusals) {
				t.Fatalf("in pieces of %d: %+v, %+v\nof 1: %+v, %+v", chop, also, other.refusals, ours, w.refusals)
			}
		}
		compareResponses(t, w.toClient.String(), methods, ours)
	})
}

func responsesOf(t *testing.T, requests string, data []byte, chop int) (*world, []seen) {
	w := newWorld(t, Config{})
	l := &listener{world: w}
	w.conn.handler = l
	w.client(requests)
	w.chop = chop
	w.server(string(data))
	w.serverFIN()
	return w, l.responses
}

// listener notes where each final response began.
type listener struct {
	*world
	responses []seen
}

func (l *listener) Response(seq uint32, status int) {
	l.responses = append(l.responses, seen{start: l.toClient.Len(), length: int64(status)})
}

func compareResponses(t *testing.T, forwarded string, methods []string, ours []seen) {
	t.Helper()
	stream := &countedReader{r: strings.NewReader(forwarded)}
	r := bufio.NewReader(stream)
	for i := 0; i < len(ours); {
		start := stream.read - r.Buffered()
		resp, err := http.ReadResponse(r, &http.Request{Method: methods[i]})
		if err != nil {
			return
		}
		if resp.StatusCode < 200 {
			continue
		}
		if got := (seen{start: start, length: int64(resp.StatusCode)}); got != ours[i] {
			t.Fatalf("response %d: net/http sees status %d at %d, we saw %d at %d in %q", i+1,
				got.length, got.start, ours[i].length, ours[i].start, forwarded)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		if err != nil {
			return
		}
		i++
	}
}

// FuzzConversation mixes both directions in any order with refusals in between,
// and checks what must hold whatever the peers send.
func FuzzConversation(f *testing.F) {
	f.Add([]byte("\x20"+getA+"\xa6"+ok), byte(0))
	f.Add([]byte("\x46"+getA+getB), byte(1))
	for mode := range byte(4) {
		f.Add([]byte("\x03FOO\x11 /b HTTP/1.1\r\nHo\x0est: a.test\r\n\r\n\xa6"+ok), mode)
		f.Add([]byte("\x20"+getA+"\x8dICY 200 OK\r\n\r\x20"+getB), mode)
		f.Add([]byte("\x0fPROXY UNKNOWN\r\n\x20"+getA+"\xa6"+ok+"\x05zz\r\n\x00"), mode)
	}
	f.Fuzz(func(t *testing.T, script []byte, mode byte) {
		if len(script) > 2048 {
			return
		}
		w := newWorld(t, Config{Mode: Mode(mode % 4), MaxSkip: 50})
		w.decide = denyB
		for len(script) > 0 {
			n := min(int(script[0]&0x7f), len(script)-1)
			piece := string(script[1 : 1+n])
			if script[0]&0x80 == 0 {
				w.client(piece)
			} else {
				w.server(piece)
			}
			script = script[1+n:]
		}
		w.serverFIN()
		w.clientFIN()
		if (mode%4 == 0 || mode%4 == 2) && !w.conn.Opaque() {
			neverB(t, w.toServer.String())
		}
	})
}

// neverB checks that the server cannot find a refused request in what it got.
func neverB(t *testing.T, forwarded string) {
	t.Helper()
	r := bufio.NewReader(strings.NewReader(forwarded))
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if req.RequestURI == "/b" {
			t.Fatalf("a refused request passed in %q", forwarded)
		}
		if _, err := io.Copy(io.Discard, req.Body); err != nil {
			return
		}
	}
}
