package tunnel_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"ringfence.dev/proxy/proxytest"
	"ringfence.dev/proxy/socket"
	"ringfence.dev/proxy/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	clientID = spiffeid.RequireFromString("spiffe://lab.test/ns/a/sa/client")
	serverID = spiffeid.RequireFromString("spiffe://lab.test/ns/b/sa/server")
)

const patience = 20 * time.Second

// sink gathers what a stream receives. It releases at once unless it stalls.
type sink struct {
	mu      sync.Mutex
	cond    *sync.Cond
	stream  *tunnel.Stream
	data    bytes.Buffer
	count   int
	status  int
	ended   bool
	reset   error
	stalled bool
	held    int
	discard bool
	react   func(p []byte) // called instead of gathering
}

func newSink() *sink {
	s := &sink{}
	s.cond = sync.NewCond(&s.mu)
	return s
}

func (s *sink) OnResponse(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = status
	s.cond.Broadcast()
}

func (s *sink) OnData(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count += len(p)
	switch {
	case s.react != nil:
		s.react(p)
	case !s.discard:
		s.data.Write(p)
	}
	if s.stalled {
		s.held += len(p)
	} else if s.stream != nil {
		s.stream.Release(len(p))
	}
	s.cond.Broadcast()
}

func (s *sink) OnEnd() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.cond.Broadcast()
}

func (s *sink) OnReset(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reset = err
	s.cond.Broadcast()
}

func (s *sink) setStream(st *tunnel.Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stream = st
	st.Release(s.count - s.held)
}

// wait waits until cond holds; it is called with the sink's lock held.
func (s *sink) wait(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	deadline := time.AfterFunc(patience, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.cond.Broadcast()
	})
	defer deadline.Stop()
	end := time.Now().Add(patience)
	s.mu.Lock()
	defer s.mu.Unlock()
	for !cond() {
		if time.Now().After(end) {
			tb.Fatalf("waited too long for %s (status %d, %d octets, ended %v, reset %v)",
				what, s.status, s.count, s.ended, s.reset)
		}
		s.cond.Wait()
	}
}

// endpoint is one side of a loopback TCP connection to be made a tunnel.
func sockets(tb testing.TB) (client, server *socket.Conn) {
	tb.Helper()
	c, s := netPair(tb)
	return adopt(tb, c), adopt(tb, s)
}

func netPair(tb testing.TB) (client, server *net.TCPConn) {
	tb.Helper()
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false)
	l, err := cfg.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func adopt(tb testing.TB, c *net.TCPConn) *socket.Conn {
	tb.Helper()
	f, err := c.File()
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	defer c.Close()
	fd, err := dup(int(f.Fd()))
	if err != nil {
		tb.Fatal(err)
	}
	s, err := socket.New(fd)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

type server struct {
	*tunnel.Conn
	mu      sync.Mutex
	streams []*tunnel.Stream
	reqs    []tunnel.Request
	sinks   []*sink
	accept  func(st *tunnel.Stream, r *tunnel.Request, s *sink) // default: answer 200
	cond    *sync.Cond
	wg      sync.WaitGroup
	err     error // of Run
	down    chan struct{}
}

func (s *server) handle(st *tunnel.Stream, r *tunnel.Request) tunnel.Sink {
	k := newSink()
	k.stream = st
	s.mu.Lock()
	s.streams, s.reqs, s.sinks = append(s.streams, st), append(s.reqs, *r), append(s.sinks, k)
	s.cond.Broadcast()
	s.mu.Unlock()
	s.mu.Lock()
	accept := s.accept
	s.mu.Unlock()
	if accept == nil {
		accept = func(st *tunnel.Stream, _ *tunnel.Request, _ *sink) { st.Respond(200) }
	}
	s.wg.Go(func() { accept(st, r, k) })
	return k
}

func (s *server) config(ca *proxytest.CA) tunnel.ServerConfig {
	return tunnel.ServerConfig{
		Certificate: func(ctx context.Context, _ netip.AddrPort, _ uint16, _ bool) (*tls.Certificate, spiffeid.ID, error) {
			cert, err := ca.Certificate(ctx, serverID)
			return cert, serverID, err
		},
		Verify: ca.Verify, Handler: s.handle, Deadline: patience,
	}
}

func newServer() *server {
	s := &server{down: make(chan struct{})}
	s.cond = sync.NewCond(&s.mu)
	return s
}

// serve makes the server end of a tunnel on sock and runs it until the test ends.
func (s *server) serve(tb testing.TB, sock *socket.Conn, ca *proxytest.CA) {
	go func() {
		defer close(s.down)
		conn, err := tunnel.Server(context.Background(), sock, s.config(ca))
		if err != nil {
			s.err = err
			return
		}
		s.mu.Lock()
		s.Conn = conn
		s.cond.Broadcast()
		s.mu.Unlock()
		s.err = conn.Run()
	}()
	tb.Cleanup(func() {
		sock.Close()
		<-s.down
		s.wg.Wait()
	})
}

func clientConfig(ca *proxytest.CA) tunnel.ClientConfig {
	cert, _ := ca.Certificate(context.Background(), clientID)
	return tunnel.ClientConfig{Certificate: cert, Verify: ca.Verify, Port: 80, Deadline: time.Now().Add(patience)}
}

// pair is a client and a server end joined by loopback.
func pair(tb testing.TB, accept func(*tunnel.Stream, *tunnel.Request, *sink)) (*tunnel.Conn, *server) {
	tb.Helper()
	ca := proxytest.NewCA(tb, "lab.test")
	cs, ss := sockets(tb)
	s := newServer()
	s.accept = accept
	s.serve(tb, ss, ca)
	c, err := tunnel.Client(cs, clientConfig(ca))
	if err != nil {
		tb.Fatal(err)
	}
	run(tb, c)
	s.await()
	return c, s
}

// at returns the n-th stream that was accepted, once it is there.
func (s *server) at(n int) (*tunnel.Stream, *sink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.sinks) <= n {
		s.cond.Wait()
	}
	return s.streams[n], s.sinks[n]
}

func (s *server) request(n int) tunnel.Request {
	s.at(n)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reqs[n]
}

// await waits for the handshake's end.
func (s *server) await() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.Conn == nil {
		s.cond.Wait()
	}
}

func run(tb testing.TB, c *tunnel.Conn) {
	tb.Helper()
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run() }()
	tb.Cleanup(func() { c.Close(); <-done })
	select {
	case <-c.Ready():
	case <-c.Done():
		tb.Fatalf("tunnel ended before it was ready: %v", c.Err())
	case <-time.After(patience):
		tb.Fatal("no settings from the peer")
	}
}

func open(tb testing.TB, c *tunnel.Conn) (*tunnel.Stream, *sink) {
	tb.Helper()
	if err := c.Reserve(1000); err != nil {
		tb.Fatal(err)
	}
	k := newSink()
	st, err := c.Open(&tunnel.Request{Authority: "127.0.0.1:80", Decision: "d", Forwarded: `for="127.0.0.1:9"`}, k)
	if err != nil {
		tb.Fatal(err)
	}
	k.setStream(st)
	k.wait(tb, "an answer", func() bool { return k.status != 0 || k.reset != nil })
	return st, k
}

// echoing answers 200 and sends back what comes.
func echoing(st *tunnel.Stream, _ *tunnel.Request, k *sink) {
	st.Respond(200)
	defer st.Close()
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		for k.data.Len() == 0 && !k.ended && k.reset == nil {
			k.cond.Wait()
		}
		p := bytes.Clone(k.data.Next(64 << 10))
		if len(p) == 0 {
			break
		}
		k.mu.Unlock()
		err := st.WriteAll([][]byte{p})
		k.mu.Lock()
		if err != nil {
			return
		}
	}
	if k.reset == nil {
		_ = st.CloseWrite()
	}
}

// raw is a foreign peer that speaks frames by the standard library.
type raw struct {
	tb testing.TB
	*tls.Conn
	fr  *http2.Framer
	enc *hpack.Encoder
	buf bytes.Buffer
}

// rawClient speaks to our server end.
func rawClient(tb testing.TB, s *server) *raw {
	tb.Helper()
	ca := proxytest.NewCA(tb, "lab.test")
	c, ss := netPair(tb)
	s.serve(tb, adopt(tb, ss), ca)
	cert, _ := ca.Certificate(context.Background(), clientID)
	conn := tls.Client(c, &tls.Config{
		Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}, InsecureSkipVerify: true,
	})
	tb.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	r := newRaw(tb, conn)
	r.write([]byte(http2.ClientPreface))
	r.must(r.fr.WriteSettings())
	s.await()
	return r
}

// rawServer speaks to our client end.
func rawServer(tb testing.TB, settings ...http2.Setting) (*raw, *tunnel.Conn) {
	tb.Helper()
	ca := proxytest.NewCA(tb, "lab.test")
	cs, s := netPair(tb)
	cert, _ := ca.Certificate(context.Background(), serverID)
	conn := tls.Server(s, &tls.Config{
		Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert,
	})
	tb.Cleanup(func() { s.Close() })
	_ = s.SetDeadline(time.Now().Add(patience))
	hello := make(chan error, 1)
	go func() { hello <- conn.Handshake() }()
	c, err := tunnel.Client(adopt(tb, cs), clientConfig(ca))
	if err = errors.Join(err, <-hello); err != nil {
		tb.Fatal(err)
	}
	r := newRaw(tb, conn)
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(conn, preface); err != nil || string(preface) != http2.ClientPreface {
		tb.Fatalf("preface %q, %v", preface, err)
	}
	r.must(r.fr.WriteSettings(settings...))
	run(tb, c)
	return r, c
}

func newRaw(tb testing.TB, conn *tls.Conn) *raw {
	r := &raw{tb: tb, Conn: conn, fr: http2.NewFramer(conn, conn)}
	r.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	r.fr.AllowIllegalWrites = true
	r.fr.SetMaxReadFrameSize(1 << 20)
	r.enc = hpack.NewEncoder(&r.buf)
	return r
}

func (r *raw) must(err error) {
	r.tb.Helper()
	if err != nil {
		r.tb.Fatal(err)
	}
}

func (r *raw) write(p []byte) {
	r.tb.Helper()
	_, err := r.Conn.Write(p)
	r.must(err)
}

func (r *raw) block(pairs ...string) []byte {
	r.buf.Reset()
	for i := 0; i < len(pairs); i += 2 {
		_ = r.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return bytes.Clone(r.buf.Bytes())
}

func (r *raw) headers(id uint32, end bool, pairs ...string) error {
	return r.fr.WriteHeaders(http2.HeadersFrameParam{
		StreamID: id, BlockFragment: r.block(pairs...), EndHeaders: true, EndStream: end,
	})
}

func (r *raw) connect(id uint32) error {
	return r.headers(id, false, ":method", "CONNECT", ":authority", "127.0.0.1:80")
}

// until reads frames until one that match accepts.
func (r *raw) until(what string, match func(http2.Frame) bool) http2.Frame {
	r.tb.Helper()
	for {
		f, err := r.fr.ReadFrame()
		if err != nil {
			r.tb.Fatalf("waiting for %s: %v", what, err)
		}
		if match(f) {
			return f
		}
	}
}

// wantGoAway reads until the connection's end and looks at the reason given, if
// one arrives: octets that the other side had not read turn its end into a reset.
func (r *raw) wantGoAway(code http2.ErrCode) {
	r.tb.Helper()
	for {
		f, err := r.fr.ReadFrame()
		if err != nil {
			if !errors.Is(err, unix.ECONNRESET) {
				r.tb.Fatalf("connection ended without GOAWAY %v: %v", code, err)
			}
			return
		}
		if g, ok := f.(*http2.GoAwayFrame); ok {
			if g.ErrCode != code {
				r.tb.Fatalf("GOAWAY %v, want %v", g.ErrCode, code)
			}
			return
		}
	}
}

func isReset(id uint32) func(http2.Frame) bool {
	return func(f http2.Frame) bool {
		r, ok := f.(*http2.RSTStreamFrame)
		return ok && r.StreamID == id
	}
}

func isStatus(id uint32, status string) func(http2.Frame) bool {
	return func(f http2.Frame) bool {
		h, ok := f.(*http2.MetaHeadersFrame)
		return ok && h.StreamID == id && h.PseudoValue("status") == status
	}
}
