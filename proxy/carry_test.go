package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/proxytest"
)

// carriers gives, per carrier, two ends joined by the relay: the workload's
// connection and the service's. Every test that uses it holds for each.
func carriers(t *testing.T, test func(t *testing.T, client, server *net.TCPConn)) {
	for name, dial := range map[string]func(t *testing.T, accept func(net.Conn)) *net.TCPConn{
		"tunnel": func(t *testing.T, accept func(net.Conn)) *net.TCPConn {
			a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
			return a.dial(t, b.service(t, "b/sa/svc", accept))
		},
		"local": func(t *testing.T, accept func(net.Conn)) *net.TCPConn {
			a, _ := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
			return a.dial(t, a.service(t, "a/sa/svc", accept))
		},
		"plain": func(t *testing.T, accept func(net.Conn)) *net.TCPConn {
			a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
			a.net.SetMesh(false)
			return a.dial(t, b.service(t, "b/sa/svc", accept))
		},
		"inbound plaintext": func(t *testing.T, accept func(net.Conn)) *net.TCPConn {
			_, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
			return b.dialAs(t, b.inbound, b.service(t, "b/sa/svc", accept), 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, release := make(chan *net.TCPConn, 1), make(chan struct{})
			client := dial(t, func(c net.Conn) {
				_ = c.SetDeadline(time.Now().Add(patience))
				got <- c.(*net.TCPConn)
				<-release
			})
			defer close(release)
			test(t, client, <-got)
		})
	}
}

func send(tb testing.TB, c net.Conn, text string) {
	tb.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		tb.Fatal(err)
	}
}

func want(tb testing.TB, c net.Conn, text string) {
	tb.Helper()
	got := make([]byte, len(text))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != text {
		tb.Fatalf("got %q, %v; want %q", got[:n], err, text)
	}
}

func wantEOF(tb testing.TB, c net.Conn) {
	tb.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		tb.Fatalf("read %d octets, %v; want the end", n, err)
	}
}

func TestServerSpeaksFirst(t *testing.T) {
	carriers(t, func(t *testing.T, client, server *net.TCPConn) {
		send(t, server, "220 ready\r\n")
		want(t, client, "220 ready\r\n")
		send(t, client, "EHLO x\r\n")
		want(t, server, "EHLO x\r\n")
	})
}

func TestHalfClose(t *testing.T) {
	carriers(t, func(t *testing.T, client, server *net.TCPConn) {
		send(t, client, "\x00question")
		_ = client.CloseWrite()
		want(t, server, "\x00question")
		wantEOF(t, server)
		send(t, server, "answer")
		want(t, client, "answer")
		_ = server.CloseWrite()
		wantEOF(t, client)
	})
	carriers(t, func(t *testing.T, client, server *net.TCPConn) {
		_ = server.CloseWrite()
		wantEOF(t, client)
		send(t, client, "\x00still talking")
		want(t, server, "\x00still talking")
		_ = client.CloseWrite()
		wantEOF(t, server)
	})
}

func TestResetPassesAsReset(t *testing.T) {
	reads := func(t *testing.T, c net.Conn) {
		t.Helper()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read %v, want a reset", err)
		}
	}
	carriers(t, func(t *testing.T, client, server *net.TCPConn) {
		send(t, client, "\x00x")
		want(t, server, "\x00x")
		_ = client.SetLinger(0)
		client.Close()
		reads(t, server)
	})
	carriers(t, func(t *testing.T, client, server *net.TCPConn) {
		send(t, client, "\x00x")
		want(t, server, "\x00x")
		_ = server.SetLinger(0)
		server.Close()
		reads(t, client)
	})
}

func TestByteAtATime(t *testing.T) {
	carriers(t, func(t *testing.T, client, server *net.TCPConn) {
		const req = "POST /x HTTP/1.1\r\nHost: b\r\nX-Forwarded-Client-Cert: forged\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
		for i := range len(req) {
			send(t, client, req[i:i+1])
		}
		r, err := http.ReadRequest(bufio.NewReader(server))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || string(body) != "hello" || r.URL.Path != "/x" {
			t.Errorf("%s %q, %v", r.URL, body, err)
		}
		const resp = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
		for i := range len(resp) {
			send(t, server, resp[i:i+1])
		}
		want(t, client, resp)
	})
}

// Large octet streams in both directions at once come through whole.
func TestBulkBothWays(t *testing.T) {
	carriers(t, func(t *testing.T, client, server *net.TCPConn) {
		const size = 8 << 20
		up, down := bytes.Repeat([]byte("\x00up-"), size/4), bytes.Repeat([]byte("down"), size/4)
		var wg sync.WaitGroup
		write := func(c *net.TCPConn, p []byte) {
			wg.Go(func() {
				if _, err := c.Write(p); err != nil {
					t.Error(err)
				}
				_ = c.CloseWrite()
			})
		}
		read := func(c *net.TCPConn, p []byte) {
			wg.Go(func() {
				got, err := io.ReadAll(c)
				if err != nil || !bytes.Equal(got, p) {
					t.Errorf("got %d octets, %v", len(got), err)
				}
			})
		}
		write(client, up)
		write(server, down)
		read(client, down)
		read(server, up)
		wg.Wait()
	})
}

func TestLargeHTTPBodies(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{HTTPOnly: httpOnly})
	to := b.web(t, "b/sa/web", func(w http.ResponseWriter, r *http.Request) {
		got, err := io.ReadAll(r.Body) // net/http does not read on once it has begun to answer
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write(got)
	})
	body := strings.Repeat("0123456789abcdef", 1<<16)
	for _, chunked := range []bool{false, true} {
		c := a.dial(t, to)
		req, _ := http.NewRequest("POST", "http://b.test/", strings.NewReader(body))
		if chunked {
			req.ContentLength = -1
		}
		go func() { _ = req.Write(c) }()
		resp, err := http.ReadResponse(bufio.NewReader(c), req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		if err != nil || string(got) != body {
			t.Errorf("chunked %v: %d octets back, %v", chunked, len(got), err)
		}
	}
}

func TestFarConnectFailureResetsBeforeAnyByte(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	b.who.SetOwner(1, who("b/sa/gone")) // an owner, and yet nobody listens
	c, err := a.net.Dial(a.outbound, netip.AddrPortFrom(b.net.IP, 1), uid)
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(patience))
		wantReset(t, c)
		c.Close()
	}
	if a.relay.Stats().Answers != 1 {
		t.Errorf("stats = %+v", a.relay.Stats())
	}
	a.who.SetOwner(1, who("a/sa/gone"))
	a.denied(t, netip.AddrPortFrom(a.net.IP, 1))
}

func TestStalledReaderDoesNotSlowNeighbour(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	release := make(chan struct{})
	defer close(release)
	var neighbour atomic.Bool
	stuck := b.service(t, "b/sa/stuck", func(c net.Conn) {
		if neighbour.Load() {
			echo(c)
			return
		}
		_ = c.(*net.TCPConn).SetReadBuffer(32 << 10)
		<-release
	})
	var stop sync.WaitGroup
	defer stop.Wait()
	var clients []net.Conn
	defer func() {
		for _, c := range clients {
			c.Close()
		}
	}()
	var written atomic.Int64
	for range 30 {
		c := a.dial(t, stuck)
		clients = append(clients, c)
		stop.Go(func() {
			p := make([]byte, 64<<10)
			for {
				n, err := c.Write(p)
				written.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
	}
	// All thirty share one tunnel with the neighbour's.
	var last int64
	quiet := 0
	eventually(t, "the stalled ones to fill up", func() bool {
		now := written.Load()
		if quiet++; now != last {
			quiet = 0
		}
		last = now
		time.Sleep(10 * time.Millisecond)
		return quiet > 30 && now > 30<<18
	})
	// A tunnel belongs to one port, so the neighbour is behind the same one.
	neighbour.Store(true)
	c := a.dial(t, stuck)
	payload := bytes.Repeat([]byte("n"), 4<<20)
	go func() { _, _ = c.Write(payload) }()
	got := make([]byte, len(payload))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, payload) {
		t.Errorf("the neighbour: %v", err)
	}
}

func TestThousandConnectionsAtOnce(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	var conns []net.Conn
	for range 1000 {
		conns = append(conns, a.dial(t, to))
	}
	var wg sync.WaitGroup
	for i, c := range conns {
		wg.Go(func() { exchange(t, c, fmt.Sprintf("\x00connection %d", i)) })
	}
	wg.Wait()
	if n := len(b.relay.Connections()); n != 1000 {
		t.Errorf("%d live connections", n)
	}
	if n := a.relay.Stats().Tunnels; n != 10 {
		t.Errorf("%d tunnels for a thousand streams, a hundred each", n)
	}
	for _, c := range conns {
		c.Close()
	}
	eventually(t, "all to end", func() bool { return len(a.relay.Connections())+len(b.relay.Connections()) == 0 })
}

func TestDrain(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	c := a.dial(t, to)
	exchange(t, c, "\x00before")
	drained := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { defer close(drained); b.relay.Drain(ctx) }()
	eventually(t, "the peer to be told", func() bool {
		for _, i := range a.relay.Tunnels() {
			if !i.Retired {
				c2, err := a.net.Dial(a.outbound, to, uid)
				if err == nil {
					c2.Close()
				}
				return false
			}
		}
		return true
	})
	exchange(t, c, "\x00while draining")
	_ = c.CloseWrite()
	wantEOF(t, c)
	within(t, "the drain", drained)
	b.net.CloseListeners()
	a.denied(t, to)
}

func TestDrainCutsAtItsDeadline(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	c := a.dial(t, b.service(t, "b/sa/echo", echo))
	l := a.dial(t, a.service(t, "a/sa/echo", echo))
	exchange(t, c, "\x00alive")
	exchange(t, l, "\x00alive")
	for _, h := range []*host{a, b} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		h.relay.Drain(ctx)
		cancel()
		within(t, "Serve to return", h.served)
	}
	wantReset(t, c)
	wantReset(t, l)
}

func TestHalfClosedIsNotKeptForEver(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	release := make(chan struct{})
	defer close(release)
	to := b.service(t, "b/sa/mute", func(net.Conn) { <-release })
	half, whole := a.dial(t, to), a.dial(t, to)
	send(t, half, "\x00")
	send(t, whole, "\x00")
	_ = half.CloseWrite()
	eventually(t, "the half-close to be seen", func() bool {
		n := 0
		for _, c := range a.relay.Connections() {
			if c.HalfClosed {
				n++
			}
		}
		return n == 1 && len(b.relay.Connections()) == 2
	})
	a.scope.Tick(30 * time.Minute) // sees its octets
	a.scope.Tick(30 * time.Minute)
	if n := len(a.relay.Connections()); n != 2 {
		t.Fatalf("%d connections after half the time", n)
	}
	a.scope.Tick(30 * time.Minute)
	if _, err := half.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read %v, want a reset", err)
	}
	eventually(t, "one to be left", func() bool { return len(a.relay.Connections()) == 1 })
}

func descriptors(tb testing.TB) int {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(entries)
}

// Ten thousand connections, ended in every way, leave nothing behind.
func TestShortConnectionsLeakNothing(t *testing.T) {
	n := 10_000
	if testing.Short() {
		n = 500
	}
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	exchange(t, a.dial(t, to), "\x00warm")
	b.dec.Set(proxytest.Policy{Connect: func(c authz.Connection) bool {
		return c.Source.Addr.Port()%16 != 0 // some are refused
	}})
	eventually(t, "the first to end", func() bool { return b.relay.Stats().AcceptedStreams == 1 })
	before := descriptors(t)
	var wg sync.WaitGroup
	next := make(chan int)
	for range 8 {
		wg.Go(func() {
			for i := range next {
				c, err := a.net.Dial(a.outbound, to, uid)
				if err != nil {
					continue
				}
				_ = c.SetDeadline(time.Now().Add(patience))
				if i%2 == 0 {
					_, _ = io.WriteString(c, "\x00x")
					_, _ = c.Read(make([]byte, 2))
				}
				if i%3 == 0 {
					_ = c.SetLinger(0)
				}
				c.Close()
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	eventually(t, "all to end", func() bool {
		streams, unread := 0, int64(0)
		for _, i := range a.relay.Tunnels() {
			streams, unread = streams+i.Streams, unread+i.Unread
		}
		// The one that warmed up is left, on both sides, and b's side of the tunnel.
		return streams == 1 && unread == 0 && a.relay.Stats().Live == 1 && b.relay.Stats().Live == 2 &&
			len(a.relay.Connections())+len(b.relay.Connections()) == 2 && descriptors(t) <= before
	})
}

// With no descriptor left for it a connection waits in the kernel's queue; the
// relay neither spins nor dies, and goes on when there are some again.
func TestDescriptorsRunOut(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	exchange(t, a.dial(t, to), "\x00warm")
	client, err := a.net.Dial(a.outbound, to, uid) // accepted before the limit, to keep the count steady
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	exchange(t, client, "\x00warm")

	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	low := old
	low.Cur = 3
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	restore := sync.OnceFunc(func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &old) })
	defer restore()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: a.net.IP.As4(), Port: int(a.outbound.Port())}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the exhaustion to be counted", func() bool { return a.relay.Stats().Exhausted > 0 })
	exchange(t, client, "\x00live ones go on")
	if n := a.relay.Stats().Exhausted; n > 20 {
		t.Errorf("%d attempts: that is spinning", n)
	}
	restore()
	eventually(t, "the queued one to be accepted", func() bool { return a.relay.Stats().NoOrigin == 1 })
	exchange(t, a.dial(t, to), "\x00and new ones again")
}

func TestShedsPastItsBound(t *testing.T) {
	ca := proxytest.NewCA(t, "lab.test")
	a := newHost(t, ca, hostConfig{mode: authz.Enforce, tune: tuneConnections(2)})
	a.who.SetCaller(uid, who("a/sa/caller"))
	to := a.service(t, "a/sa/echo", echo)
	c1, c2 := a.dial(t, to), a.dial(t, to)
	exchange(t, c1, "\x001")
	exchange(t, c2, "\x002")
	a.denied(t, to)
	exchange(t, c1, "\x00old work is unharmed")
	c2.Close()
	eventually(t, "room", func() bool { return a.relay.Stats().Live == 1 })
	exchange(t, a.dial(t, to), "\x003")
	if a.relay.Stats().Shed != 1 {
		t.Errorf("stats = %+v", a.relay.Stats())
	}
}

// A replaced leaf is used from the next connection on; the live ones stay.
func TestRenewedLeaf(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	c := a.dial(t, to)
	exchange(t, c, "\x00old")
	b.ca.Renew(who("a/sa/caller").ID)
	exchange(t, a.dial(t, to), "\x00new")
	exchange(t, c, "\x00old")
	if n := a.relay.Stats().DialledTunnels; n != 2 {
		t.Errorf("%d tunnels", n)
	}
	b.ca.Renew(who("b/sa/echo").ID)
	b.relay.Retire(who("b/sa/echo").ID)
	eventually(t, "the clients to be told", func() bool {
		exchange(t, a.dial(t, to), "\x00newest")
		return a.relay.Stats().DialledTunnels == 3
	})
	exchange(t, c, "\x00old")
}
