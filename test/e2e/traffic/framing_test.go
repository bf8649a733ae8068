package traffic_test

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"ringfence.dev/test/e2e/world"
	"ringfence.dev/tools/ringfence/lab"
)

// The relay may not be noticed: what a client and a server do to each other
// arrives as it was done, in both families.
func TestTransparency(t *testing.T) {
	world.ForEach(t, lab.Options{}, func(t *testing.T, w *world.World) {
		shop, server := w.Puppet("a", "shop"), w.Puppet("b", "server")
		for _, ip := range world.Addresses {
			l := server.Listen(port(ip, "7000"))
			// pair is a client's connection and the server's end of it.
			pair := func(t *testing.T) (client, far *world.Conn) {
				t.Helper()
				c := shop.In(t).MustDial(port(ip, "7000"))
				s := l.In(t).MustAccept()
				t.Cleanup(func() { _ = c.Close(); _ = s.Close() })
				return c, s
			}
			name := "IPv4"
			if strings.Contains(ip, ":") {
				name = "IPv6"
			}
			t.Run(name, func(t *testing.T) {
				t.Run("server first", func(t *testing.T) { serverFirst(t, pair) })
				t.Run("addresses", func(t *testing.T) { addresses(t, w, ip, pair) })
				t.Run("client half closes", func(t *testing.T) { clientHalfCloses(t, pair) })
				t.Run("server half closes", func(t *testing.T) { serverHalfCloses(t, pair) })
				t.Run("client resets", func(t *testing.T) { clientResets(t, pair) })
				t.Run("server resets", func(t *testing.T) { serverResets(t, pair) })
				t.Run("bytes either way", func(t *testing.T) { bytesEitherWay(t, pair) })
				t.Run("HTTP", func(t *testing.T) { forEachMessage(t, pair) })
				t.Run("closed port", func(t *testing.T) { closedPort(t, shop.In(t), ip) })
			})
			l.Close()
		}
	})
}

type pairing func(*testing.T) (client, server *world.Conn)

// Nobody waits for a client that says nothing: a tenth of a second would be a
// timer, and a loaded machine is not that slow ten times in a row.
func serverFirst(t *testing.T, pair pairing) {
	var fastest time.Duration
	for range 10 {
		start := time.Now()
		c, s := pair(t)
		s.Send("220 ready\r\n")
		c.Want("220 ready\r\n")
		if d := time.Since(start); fastest == 0 || d < fastest {
			fastest = d
		}
		c.Send("QUIT\r\n")
		s.Want("QUIT\r\n")
		_, _ = c.Close(), s.Close()
	}
	if fastest > 100*time.Millisecond {
		t.Errorf("a server that speaks first was heard after %v at best", fastest)
	}
}

func addresses(t *testing.T, w *world.World, ip string, pair pairing) {
	c, s := pair(t)
	if c.Remote != port(ip, "7000") {
		t.Errorf("the client sees the server as %s", c.Remote)
	}
	if w.Capture == "ebpf" {
		client := strings.Replace(port(ip, ""), "2]", "1]", 1)
		client = strings.Replace(client, ".2:", ".1:", 1)
		if !strings.HasPrefix(s.Remote, client) {
			t.Errorf("the server sees the client as %s", s.Remote)
		}
	}
}

func clientHalfCloses(t *testing.T, pair pairing) {
	c, s := pair(t)
	c.Send("the whole question")
	c.CloseWrite()
	if got, err := s.Rest(); got != "the whole question" || err != nil {
		t.Errorf("server read %q, %v", got, err)
	}
	s.Send("the answer")
	c.Want("the answer")
	_ = s.Close()
	if got, err := c.Rest(); got != "" || err != nil {
		t.Errorf("client read %q, %v", got, err)
	}
}

func serverHalfCloses(t *testing.T, pair pairing) {
	c, s := pair(t)
	s.Send("goodbye")
	s.CloseWrite()
	if got, err := c.Rest(); got != "goodbye" || err != nil {
		t.Errorf("client read %q, %v", got, err)
	}
	c.Send("one more thing")
	c.CloseWrite()
	if got, err := s.Rest(); got != "one more thing" || err != nil {
		t.Errorf("server read %q, %v", got, err)
	}
}

func clientResets(t *testing.T, pair pairing) {
	c, s := pair(t)
	c.Send("x")
	s.Want("x")
	c.Reset()
	if got, err := s.Rest(); got != "" || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("server read %q, %v; want a reset", got, err)
	}
}

func serverResets(t *testing.T, pair pairing) {
	c, s := pair(t)
	c.Send("x")
	s.Want("x")
	s.Reset()
	if got, err := c.Rest(); got != "" || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client read %q, %v; want a reset", got, err)
	}
}

// What looks like nothing in particular passes byte for byte.
func bytesEitherWay(t *testing.T, pair pairing) {
	for _, text := range []string{"\x00", "\r\n\r\n", "GET k\r\n", "GET /old\r\n", "hello", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "*1\r\n$4\r\nPING\r\n", "PING\r\n", "SSH-2.0-x\r\n",
		"SET k X-Forwarded-Client-Cert:\r\nX-Forwarded-Client-Cert: URI=spiffe://lab.test/king\r\n\r\n"} {
		c, s := pair(t)
		c.Send(text)
		s.Want(text)
		s.Send(text)
		c.Want(text)
		c.SendBytewise(text)
		s.Want(text)
	}
	c, s := pair(t)
	big := strings.Repeat("0123456789abcdef", 1<<15)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte(big))
		sent <- err
	}()
	got := make([]byte, len(big))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != big {
		t.Errorf("512 KiB arrived changed (%v)", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// message is an HTTP exchange as bytes on both sides. The identity header is
// the only thing that may be added on the way.
type message struct {
	name, request, response string
	// open: after the response both sides go on talking.
	open bool
	// eof: the response ends with the connection.
	eof bool
}

var messages = []message{
	{name: "GET", request: "GET /a?b=c HTTP/1.1\r\nHost: x\r\nX-Odd:  spaced \r\n\r\n", response: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
	{name: "POST", request: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nthree", response: "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"},
	{name: "chunks and trailers",
		request:  "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5;ext=1\r\nthree\r\n0\r\nX-Sum: 3\r\n\r\n",
		response: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n"},
	{name: "HEAD", request: "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", response: "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"},
	{name: "204", request: "DELETE /x HTTP/1.1\r\nHost: x\r\n\r\n", response: "HTTP/1.1 204 No Content\r\n\r\n"},
	{name: "304", request: "GET / HTTP/1.1\r\nHost: x\r\nIf-None-Match: \"1\"\r\n\r\n", response: "HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\nETag: \"1\"\r\n\r\n"},
	{name: "103 early hints", request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		response: "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"},
	{name: "absolute form", request: "GET http://x/a HTTP/1.1\r\nHost: x\r\n\r\n", response: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
	{name: "OPTIONS *", request: "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", response: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
	{name: "extension method", request: "PROPFIND /dav HTTP/1.1\r\nHost: x\r\nDepth: 1\r\n\r\n", response: "HTTP/1.1 207 Multi-Status\r\nContent-Length: 0\r\n\r\n"},
	{name: "HTTP/1.0 to the end", request: "GET / HTTP/1.0\r\n\r\n", response: "HTTP/1.0 200 OK\r\n\r\nuntil the end", eof: true},
	{name: "HTTP/1.1 to the end", request: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", response: "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", eof: true},
	{name: "upgrade", request: "GET /live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		response: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", open: true},
	{name: "CONNECT", request: "CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n", response: "HTTP/1.1 200 OK\r\n\r\n", open: true},
}

func forEachMessage(t *testing.T, pair pairing) {
	for _, m := range messages {
		t.Run(m.name, func(t *testing.T) {
			c, s := pair(t)
			oneMessage(t, c, s, m)
			if !m.open && !m.eof { // and once more, on the same connection
				oneMessage(t, c, s, m)
			}
		})
	}
	t.Run("100-continue", func(t *testing.T) { expectContinue(t, pair) })
	t.Run("pipelined", func(t *testing.T) { pipelined(t, pair) })
	t.Run("response before the request's end", func(t *testing.T) { earlyResponse(t, pair) })
}

func oneMessage(t *testing.T, c, s *world.Conn, m message) {
	t.Helper()
	c.Send(m.request)
	wantRequest(t, s, m.request)
	s.Send(m.response)
	if m.eof {
		_ = s.Close()
		if got, err := c.Rest(); got != m.response || err != nil {
			t.Errorf("client read %q (%v), want %q", got, err, m.response)
		}
		return
	}
	c.Want(m.response)
	if m.open {
		c.Send("\x81\x05three")
		s.Want("\x81\x05three")
		s.Send("\x88\x00")
		c.Want("\x88\x00")
		c.CloseWrite()
		if got, err := s.Rest(); got != "" || err != nil {
			t.Errorf("server read %q, %v", got, err)
		}
	}
}

// wantRequest reads a request at the server: what was sent, with the caller's identity added to the head.
func wantRequest(t *testing.T, s *world.Conn, sent string) {
	t.Helper()
	head, body, _ := strings.Cut(sent, "\r\n\r\n")
	got := readUntil(t, s, "\r\n\r\n")
	var rest []string
	told := 0
	for _, line := range strings.Split(strings.TrimSuffix(got, "\r\n\r\n"), "\r\n") {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.EqualFold(name, "x-forwarded-client-cert") {
			told++
			if !strings.Contains(value, "URI="+idShop) {
				t.Errorf("the server was told %q", line)
			}
			continue
		}
		rest = append(rest, line)
	}
	if g := strings.Join(rest, "\r\n"); g != head || told != 1 {
		t.Errorf("the server got %q, told %d times who calls; want %q, once", g, told, head)
	}
	if body != "" {
		s.Want(body)
	}
}

// readUntil reads byte by byte, so as to take nothing of what follows.
func readUntil(t *testing.T, c io.Reader, end string) string {
	t.Helper()
	var b strings.Builder
	one := make([]byte, 1)
	for !strings.HasSuffix(b.String(), end) {
		if _, err := io.ReadFull(c, one); err != nil {
			t.Fatalf("after %q: %v", b.String(), err)
		}
		b.Write(one)
	}
	return b.String()
}

func expectContinue(t *testing.T, pair pairing) {
	c, s := pair(t)
	const head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
	c.Send(head)
	wantRequest(t, s, head)
	s.Send("HTTP/1.1 100 Continue\r\n\r\n")
	c.Want("HTTP/1.1 100 Continue\r\n\r\n")
	c.Send("abc")
	s.Want("abc")
	s.Send("HTTP/1.1 204 No Content\r\n\r\n")
	c.Want("HTTP/1.1 204 No Content\r\n\r\n")
}

func pipelined(t *testing.T, pair pairing) {
	c, s := pair(t)
	const one, two = "GET /1 HTTP/1.1\r\nHost: x\r\n\r\n", "POST /2 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n2"
	c.Send(one + two + one)
	wantRequest(t, s, one)
	wantRequest(t, s, two)
	wantRequest(t, s, one)
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"
	s.Send(answer + "1" + answer + "2" + answer + "3")
	c.Want(answer + "1" + answer + "2" + answer + "3")
}

func earlyResponse(t *testing.T, pair pairing) {
	c, s := pair(t)
	const head = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\n"
	c.Send(head + "abc")
	wantRequest(t, s, head+"abc")
	s.Send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nABC\r\n")
	c.Want("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nABC\r\n")
	c.Send("def")
	s.Want("def")
	s.Send("3\r\nDEF\r\n0\r\n\r\n")
	c.Want("3\r\nDEF\r\n0\r\n\r\n")
}

// A port that nobody listens on refuses, before any byte.
func closedPort(t *testing.T, p *world.Puppet, ip string) {
	c, err := p.Dial(port(ip, "7999"))
	if err == nil {
		var got string
		got, err = c.Rest()
		if got != "" {
			t.Errorf("a closed port said %q", got)
		}
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a closed port: %v", err)
	}
}

// Go's own server and client agree that nothing has happened to their messages.
func TestWebServer(t *testing.T) {
	world.ForEach(t, lab.Options{}, func(t *testing.T, w *world.World) {
		w.Puppet("b", "web").Web("[::]:80")
		for _, ip := range world.Addresses {
			url := "http://" + port(ip, "80")
			r := w.Curl("a", "shop", "-H", "Transfer-Encoding: chunked", "-H", "X-Mine: kept", "-d", "three lamps", url+"/orders/7?q=1")
			body, status, _ := strings.Cut(r.Out, "\n\n")
			var got world.SeenRequest
			if err := json.Unmarshal([]byte(body), &got); err != nil || status != "200" {
				t.Fatalf("%s: %v", r.Out, err)
			}
			if got.Method != "POST" || got.Target != "/orders/7?q=1" || got.Body != "three lamps" || got.Header.Get("X-Mine") != "kept" ||
				got.Host != strings.TrimSuffix(port(ip, "80"), ":80") || !strings.Contains(got.Header.Get("X-Forwarded-Client-Cert"), "URI="+idShop) {
				t.Errorf("the server saw %+v", got)
			}
			for path, want := range map[string]string{
				"/chunked": "chunk 0\nchunk 1\nchunk 2\n\n200", "/status/204": "\n204", "/status/304": "\n304", "/status/500": "\n500",
			} {
				if r := w.Curl("a", "shop", url+path); r.Out != want {
					t.Errorf("%s: %q, want %q", path, r.Out, want)
				}
			}
			if r := w.Curl("a", "shop", "-o", "/dev/null", url+"/bytes/10000000"); r.Code != 0 {
				t.Errorf("10 MB: %+v", r)
			}
			if r := w.Curl("a", "shop", "-I", url+"/bytes/1000"); !strings.Contains(r.Out, "Content-Length: 1000") {
				t.Errorf("HEAD: %+v", r)
			}
		}
	})
}
