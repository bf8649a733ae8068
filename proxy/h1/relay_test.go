package h1

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// relay is the smallest thing that can drive a filter between two sockets.
type relay struct {
	mu   sync.Mutex // held over steps and writes
	conn *Conn
	side [2]struct { // 0 the client, 1 the server
		sock net.Conn
		in   []byte
		eof  bool
	}
}

// stepLocked runs the filter of one side on what it has, and then the other's if that
// can go on. mu is held.
func (r *relay) stepLocked(from int) {
	in, to := &r.side[from], &r.side[1-from]
	var out Out
	step := r.conn.Downstream
	if from == 1 {
		step = r.conn.Upstream
	}
	n, err := step(in.in, in.eof, &out)
	forward, reply := net.Buffers(out.Forward), net.Buffers(out.Reply)
	_, _ = forward.WriteTo(to.sock)
	_, _ = reply.WriteTo(in.sock)
	in.in = append([]byte(nil), in.in[n:]...)
	if out.ForwardEOF {
		_ = to.sock.(*net.TCPConn).CloseWrite()
	}
	if out.Close || err != nil {
		r.side[0].sock.Close()
		r.side[1].sock.Close()
	}
	if out.Wake {
		r.stepLocked(1 - from)
	}
}

func (r *relay) run(from int) {
	buf := make([]byte, 8192)
	for {
		n, err := r.side[from].sock.Read(buf)
		r.mu.Lock()
		r.side[from].in = append(r.side[from].in, buf[:n]...)
		r.side[from].eof = r.side[from].eof || err != nil
		r.stepLocked(from)
		r.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// through serves handler behind filters made of cfg and h, and returns the
// address to dial and a client that does. All of it ends with the test.
func through(t *testing.T, cfg *Config, h Handler, handler http.Handler) (addr string, client *http.Client) {
	t.Helper()
	srv := httptest.NewServer(handler)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", srv.Listener.Addr().String())
			if err != nil {
				t.Error(err)
				c.Close()
				return
			}
			r := &relay{conn: New(cfg, h)}
			r.side[0].sock, r.side[1].sock = c, up
			var pair sync.WaitGroup
			pair.Go(func() { r.run(0) })
			pair.Go(func() { r.run(1) })
			wg.Go(func() { pair.Wait(); c.Close(); up.Close() })
		}
	})
	tr := &http.Transport{
		// Whatever the host, the relay is dialled.
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, l.Addr().String())
		},
		ExpectContinueTimeout: time.Minute, // waiting for it would fail the test by its deadline
	}
	t.Cleanup(func() {
		l.Close()
		tr.CloseIdleConnections()
		srv.Close()
		wg.Wait()
	})
	return l.Addr().String(), &http.Client{Transport: tr}
}

// gate refuses /refused and adds a line to the rest.
type gate struct {
	t testing.TB
	n atomic.Int32 // requests decided
}

func (g *gate) Request(h *Head) Verdict {
	g.n.Add(1)
	if strings.HasPrefix(h.Target, "/refused") {
		return Verdict{Reply: Deny(403, "aa-1", "not for you")}
	}
	return Verdict{Allow: true, Add: AppendXFCC(nil, "spiffe://t/b", "spiffe://t/a", nil)}
}
func (g *gate) Response(uint32, int) {}
func (g *gate) Refused(r Refusal) *Reply {
	g.t.Errorf("refused: %+v", r)
	return nil
}

// origin echoes bodies, with what it saw in front.
func origin(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get(XFCCField) != "By=spiffe://t/b;URI=spiffe://t/a" {
		http.Error(w, "forged "+r.Header.Get(XFCCField), http.StatusTeapot)
		return
	}
	switch r.URL.Path {
	case "/hints":
		w.Header().Set("Link", "</x>")
		w.WriteHeader(http.StatusEarlyHints)
	case "/upgrade":
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(c, rw)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if sum := r.Trailer.Get("X-Sum"); sum != "" || r.Trailer.Get(XFCCField) != "" {
		w.Header().Set("Got-Trailer", sum+r.Trailer.Get(XFCCField))
	}
	w.Header().Set("Trailer", "X-Done")
	_, _ = w.Write(body)
	w.Header().Set("X-Done", "yes")
}

func TestRealClientAndServer(t *testing.T) {
	g := &gate{t: t}
	_, client := through(t, &Config{Strip: NewNames(IdentityFields()...)}, g, http.HandlerFunc(origin))
	big := strings.Repeat("0123456789abcdef", 1<<16)
	reused, hints := 0, 0
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) {
			if i.Reused {
				reused++
			}
		},
		Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			if code == http.StatusEarlyHints {
				hints++
			}
			return nil
		},
	})
	requests := []struct {
		method, path, body string
		chunked, expect    bool
		status             int
	}{
		{"GET", "/", "", false, false, 200},
		{"HEAD", "/", "", false, false, 200},
		{"POST", "/", big, false, false, 200},
		{"POST", "/", big, true, false, 200},
		{"GET", "/refused", "", false, false, 403},
		{"POST", "/refused", "small", false, false, 403},
		{"PUT", "/refused", "small", true, false, 403},
		{"GET", "/hints", "", false, false, 200},
		{"POST", "/", "expected", false, true, 200},
		{"REPORT", "/", "x", false, false, 200},
	}
	for i, c := range requests {
		req, err := http.NewRequestWithContext(ctx, c.method, "http://unused.test"+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X_forwarded_client_cert", "forged")
		if c.chunked {
			req.ContentLength = -1
			req.Trailer = http.Header{"X-Sum": {"1"}, XFCCField: {"forged"}}
		}
		if c.expect {
			req.Header.Set("Expect", "100-continue")
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		want := c.body
		if c.status != 200 {
			want = string(Deny(403, "aa-1", "not for you").Body)
		}
		if err != nil || resp.StatusCode != c.status || string(body) != want {
			t.Errorf("%d: status %d, %d octets, %v", i, resp.StatusCode, len(body), err)
		}
		if got := resp.Header.Get("Got-Trailer"); c.chunked && c.status == 200 && got != "1" {
			t.Errorf("%d: trailer %q", i, got)
		}
		if c.status == 200 && c.method != "HEAD" && resp.Trailer.Get("X-Done") != "yes" {
			t.Errorf("%d: response trailers %v", i, resp.Trailer)
		}
	}
	if reused != len(requests)-1 || hints != 1 || int(g.n.Load()) != len(requests) {
		t.Errorf("%d of %d requests on a connection used before, %d hints, %d decided", reused, len(requests), hints, g.n.Load())
	}
}

func TestRealUpgrade(t *testing.T) {
	addr, _ := through(t, &Config{Strip: NewNames(IdentityFields()...)}, &gate{t: t}, http.HandlerFunc(origin))
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	noise := bytes.Repeat([]byte("\x00\r\n\r\nGET /refused HTTP/1.1\r\n"), 1000)
	_, _ = c.Write([]byte("GET /upgrade HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly"))
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("%v %v", resp, err)
	}
	go func() {
		_, _ = c.Write(noise)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(r)
	if err != nil || string(got) != "early"+string(noise) {
		t.Errorf("%d octets of %d came back, %v", len(got), len(noise), err)
	}
}
