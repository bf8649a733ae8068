package h1

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// world drives a Conn as a relay does: it keeps what a step left, and writes
// down what went where.
type world struct {
	t    testing.TB
	conn *Conn
	chop int // octets per step, 0 for all at once

	fromClient, fromServer []byte // not taken yet
	toServer, toClient     strings.Builder
	serverEOF, clientEOF   bool // half-closes passed on
	closed                 bool
	cut                    error

	requests  []string
	bodies    []int64
	responses []string
	refusals  []Refusal
	decide    func(h *Head) Verdict
	pass      bool // Refused lets it go on
}

func newWorld(t testing.TB, cfg Config) *world {
	if cfg.Upgrades == nil {
		cfg.Upgrades = []string{"websocket", connectToken}
	}
	w := &world{t: t}
	w.conn = New(&cfg, w)
	return w
}

func (w *world) Request(h *Head) Verdict {
	w.requests = append(w.requests, fmt.Sprintf("%s %s %s", h.Method, h.Target, h.Host))
	w.bodies = append(w.bodies, h.ContentLength)
	if w.decide == nil {
		return Verdict{Allow: true}
	}
	return w.decide(h)
}

func (w *world) Response(seq uint32, status int) {
	w.responses = append(w.responses, fmt.Sprintf("%d:%d", seq, status))
}

func (w *world) Refused(r Refusal) *Reply {
	w.refusals = append(w.refusals, r)
	if w.pass {
		return Pass
	}
	return nil
}

func (w *world) client(data string) { w.feed(data, false, w.down) }
func (w *world) server(data string) { w.feed(data, false, w.up) }
func (w *world) clientFIN()         { w.down("", true) }
func (w *world) serverFIN()         { w.up("", true) }

func (w *world) feed(data string, eof bool, step func(string, bool)) {
	if w.chop == 0 {
		step(data, eof)
		return
	}
	for len(data) > 0 {
		n := min(w.chop, len(data))
		step(data[:n], false)
		data = data[n:]
	}
}

func (w *world) down(data string, eof bool) {
	if w.closed || w.cut != nil {
		return
	}
	w.fromClient = append(w.fromClient, data...)
	var out Out
	n, err := w.conn.Downstream(w.fromClient, eof, &out)
	w.take(&out, &w.toServer, &w.serverEOF, err)
	w.fromClient = w.fromClient[n:]
	w.flags(&out, len(w.fromClient))
	if out.Wake {
		w.up("", false)
	}
}

func (w *world) up(data string, eof bool) {
	if w.closed || w.cut != nil {
		return
	}
	w.fromServer = append(w.fromServer, data...)
	var out Out
	n, err := w.conn.Upstream(w.fromServer, eof, &out)
	if len(out.Reply) > 0 {
		w.t.Error("an Upstream step gave a Reply")
	}
	w.take(&out, &w.toClient, &w.clientEOF, err)
	w.fromServer = w.fromServer[n:]
	w.flags(&out, len(w.fromServer))
	if out.Wake {
		w.down("", false)
	}
}

func (w *world) take(out *Out, forward *strings.Builder, eof *bool, err error) {
	for _, b := range out.Forward {
		forward.Write(b)
	}
	for _, b := range out.Reply {
		if w.clientEOF {
			w.t.Error("a Reply after the end of the stream")
		}
		w.toClient.Write(b)
	}
	*eof = *eof || out.ForwardEOF
	w.closed = w.closed || out.Close
	var cut *CutError
	if err != nil && !errors.As(err, &cut) {
		w.t.Errorf("error of type %T", err)
	}
	w.cut = err
}

func (w *world) flags(out *Out, left int) {
	if (out.NeedMore || out.Hold) != (left > 0) || out.NeedMore && out.Hold {
		w.t.Errorf("%d octets left, NeedMore %v, Hold %v", left, out.NeedMore, out.Hold)
	}
	if out.Opaque && left > 0 {
		w.t.Errorf("opaque, but %d octets left", left)
	}
}

func (w *world) wantServer(want string) {
	w.t.Helper()
	if got := w.toServer.String(); got != want {
		w.t.Errorf("the server got\n%q, want\n%q", got, want)
	}
}

func (w *world) wantClient(want string) {
	w.t.Helper()
	if got := w.toClient.String(); got != want {
		w.t.Errorf("the client got\n%q, want\n%q", got, want)
	}
}

func TestPassesUntouched(t *testing.T) {
	for _, chop := range []int{0, 1, 2, 3, 7} {
		w := newWorld(t, Config{})
		w.chop = chop
		const request = "GET /a HTTP/1.1\r\nHost:  Shop.test:80 \r\nX-Odd:\tv\t\r\n\r\n"
		const response = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
		w.client(request)
		w.wantServer(request)
		w.server(response)
		w.wantClient(response)
		if len(w.requests) != 1 || w.requests[0] != "GET /a shop.test:80" {
			t.Errorf("chop %d: requests %q", chop, w.requests)
		}
		if !w.conn.Idle() {
			t.Errorf("chop %d: not idle", chop)
		}
	}
}
