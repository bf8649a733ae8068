package tunnel

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"ringfence.dev/proxy/socket"
)

// record is the layer below frames: TLS in life, memory in fuzzing.
type record interface {
	// write seals p; push gives the kernel what is sealed; drain does so waiting.
	write(p []byte) error
	push() (blocked bool, err error)
	drain() error
	pending() bool
}

type tlsRecord struct {
	*tls.Conn
	*wire
}

func (r tlsRecord) write(p []byte) error {
	_, err := r.Conn.Write(p)
	return err
}

// Conn is one tunnel. All methods may be called from any goroutine, except
// Run, which is called once.
type Conn struct {
	// Set before Run, then read-only.
	client  bool
	sock    *socket.Conn
	wire    *wire
	tls     *tls.Conn
	record  record
	handler Handler // server only
	peer    spiffeid.ID
	self    spiffeid.ID // server only: whose certificate was shown
	port    uint16      // server only: the port the client named, zero for none
	cert    *tls.Certificate
	hash    [32]byte // server only: SHA-256 of the peer's leaf
	// Local and Remote are the TCP connection's addresses.
	Local, Remote netip.AddrPort

	in     frameReader   // owned by the reader, no lock
	ready  chan struct{} // closed at the peer's first SETTINGS
	done   chan struct{} // closed when Run returns
	alive  *time.Timer   // runs keepAlive; made by Run
	drains sync.WaitGroup

	// mu held means the frames in out are complete and in order, and the
	// windows below agree with them. Never held while waiting or writing.
	mu       sync.Mutex
	out      []byte // frames waiting for a flush
	spare    []byte // the other buffer, nil while a flush uses it
	answers  int    // octets in out that the peer made us queue
	flushing bool   // somebody flushes, or waits to
	feeding  bool   // the reader is at work, and flushes before it waits
	broken   bool   // nothing can be written any more
	flushed  *sync.Cond
	streams  map[uint32]*Stream
	waiting  []*Stream // writers that wait for connection credit or room in out
	enc      *hpack.Encoder
	encBuf   bytes.Buffer
	lastID   uint32 // highest stream opened: by us on a client, by the peer on a server
	nextID   uint32 // client only
	reserved int    // client only: slots promised by Reserve
	held     int    // server only: streams whose handler is not done
	err      error  // why the connection ended; nil while it lives

	sendWindow  int64 // RFC 9113 section 6.9.1
	peerInitial int64
	peerFrame   int
	peerStreams uint32
	recvWindow  int64 // what the peer may still send
	recvCredit  int64 // received, not yet returned
	grown       int64 // of growthBudget
	unread      int64 // octets in sinks' hands

	draining bool // no new streams from us; the peer was told or told us
	final    bool // server only: streams after lastID are refused
	pinged   time.Time
	frames   uint64 // received, to see life
	seen     uint64 // frames at the last tick
	idleFor  time.Duration
	counts   struct{ settings, pings, empty, refused, other int }
	stats    Stats
}

// Stats counts what a connection did. The zero value is an unused one's.
type Stats struct {
	Opened   uint64 `json:"opened"`   // streams, ever
	BytesIn  uint64 `json:"bytes_in"` // DATA payload
	BytesOut uint64 `json:"bytes_out"`
	Flushes  uint64 `json:"flushes"`
	Frames   uint64 `json:"frames_in"`
}

func newConn(sock *socket.Conn, client bool) *Conn {
	t := &Conn{
		client: client, sock: sock,
		ready: make(chan struct{}), done: make(chan struct{}),
		streams:    make(map[uint32]*Stream),
		sendWindow: 65535, peerInitial: 65535, peerFrame: 16 << 10, // RFC 9113 section 6.5.2
		peerStreams: maxStreams,
		recvWindow:  connWindow,
		nextID:      1,
	}
	if sock != nil {
		t.wire = &wire{sock: sock}
		t.Local, t.Remote = sock.LocalAddr(), sock.RemoteAddr()
	}
	t.enc = hpack.NewEncoder(&t.encBuf)
	t.flushed = sync.NewCond(&t.mu)
	t.in.init(t, !client)
	return t
}

// Peer is the verified identity at the other end.
func (t *Conn) Peer() spiffeid.ID { return t.peer }

// Shown tells, on a server, whose certificate was shown and for which port; the
// port is zero when the client named none.
func (t *Conn) Shown() (spiffeid.ID, uint16) { return t.self, t.port }

// PeerHash is the SHA-256 of the client's leaf certificate, on a server.
func (t *Conn) PeerHash() []byte { return t.hash[:] }

// Certificate is the SVID that this side showed.
func (t *Conn) Certificate() *tls.Certificate { return t.cert }

// Ready is closed once the peer has accepted our certificate and sent its
// settings. Until then a client does not know that it is let in (in TLS 1.3 the
// server judges the client's certificate last).
func (t *Conn) Ready() <-chan struct{} { return t.ready }

// Done is closed when Run has returned.
func (t *Conn) Done() <-chan struct{} { return t.done }

// greet queues the preface (RFC 9113 section 3.4): the client's fixed octets,
// our settings, and the connection's credit.
func (t *Conn) greet() {
	t.mu.Lock()
	if t.client {
		t.out = append(t.out, http2.ClientPreface...)
	}
	t.out = appendHeader(t.out, 6*5, http2.FrameSettings, 0, 0)
	t.out = appendSetting(t.out, http2.SettingEnablePush, 0)
	t.out = appendSetting(t.out, http2.SettingMaxConcurrentStreams, maxStreams)
	t.out = appendSetting(t.out, http2.SettingInitialWindowSize, initialWindow)
	t.out = appendSetting(t.out, http2.SettingMaxFrameSize, maxFrame)
	t.out = appendSetting(t.out, http2.SettingMaxHeaderListSize, maxHeaderList)
	t.out = appendWindowUpdate(t.out, 0, connWindow-65535)
	t.mu.Unlock()
	t.kick()
}

// Run reads the connection until it ends and returns why: nil after an orderly
// end. When it returns, every stream has been reset and everything that the
// connection started is gone.
func (t *Conn) Run() error {
	t.mu.Lock()
	t.alive = time.AfterFunc(pingInterval, t.keepAlive)
	t.mu.Unlock()
	err := t.fail(t.read())
	t.alive.Stop()
	t.farewell(err)
	t.sock.Close()
	t.wire.release()
	t.drains.Wait()
	t.resetAll(err)
	close(t.done)
	if errors.Is(err, ErrClosed) || errors.Is(err, errPeerClosed) {
		return nil
	}
	return err
}

// errPeerClosed is an end at a point where nothing is lost by it.
var errPeerClosed = errors.New("tunnel: peer closed the connection")

func (t *Conn) read() error {
	for {
		if t.wire.atRecord() {
			if err := t.wire.fill(); err != nil {
				return fmt.Errorf("%w: %w", errPeerClosed, err)
			}
		}
		t.mu.Lock()
		t.feeding = true
		t.mu.Unlock()
		if err := t.readRecords(); err != nil {
			return err
		}
	}
}

// readRecords reads one record, and those that were read ahead with it as far
// as a buffer takes them: a stream's octets then go on in one piece.
func (t *Conn) readRecords() error {
	class := socket.Small // one record's plaintext fits
	if t.wire.ahead() > recordSize {
		class = socket.Large
	}
	b := socket.Borrow(class)
	defer b.Free()
	n, err := t.tls.Read(b.Room())
	b.Grow(n)
	// What is in b must not wait for what is still on its way.
	t.wire.hasty = true
	for err == nil && len(b.Room()) >= recordSize && t.wire.ahead() > 0 {
		n, err = t.tls.Read(b.Room())
		b.Grow(n)
	}
	t.wire.hasty = false
	if err := t.in.feed(b.Bytes); err != nil {
		return err
	}
	if err != nil && !errors.Is(err, errNotNow) {
		return fmt.Errorf("%w: %w", errPeerClosed, err)
	}
	return nil
}

// fail records why the connection ends, once, and makes the reader notice. It
// returns the recorded reason. The caller does not hold mu.
func (t *Conn) fail(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return t.err
	}
	t.err = err
	t.wakeLocked()
	for _, s := range t.streams {
		s.wakeLocked()
	}
	if t.sock != nil {
		// Not Close, which waits for the reader, and the reader may be the caller.
		_ = t.sock.Control(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RD) })
	}
	return t.err
}

// resetAll tells every sink that its stream is over.
func (t *Conn) resetAll(err error) {
	t.mu.Lock()
	streams := t.streams
	t.streams = map[uint32]*Stream{}
	for _, s := range streams {
		s.overLocked()
	}
	t.mu.Unlock()
	for _, s := range streams {
		s.sink.OnReset(err)
	}
}

// farewell sends what is queued and a GOAWAY with the code that err calls for.
// After an orderly end it gives the peer farewellTime to take it, for the last
// stream's END_STREAM may be in it; otherwise only what the socket takes at once.
func (t *Conn) farewell(err error) {
	code := http2.ErrCodeNo
	var ce *ConnError
	if errors.As(err, &ce) {
		code = ce.Code
	}
	deadline := past
	if errors.Is(err, ErrClosed) || code != http2.ErrCodeNo {
		deadline = time.Now().Add(farewellTime)
	}
	_ = t.sock.SetWriteDeadline(deadline)
	t.mu.Lock()
	t.feeding = false
	t.out = appendGoAway(t.out, t.remoteLastLocked(), code)
	t.mu.Unlock()
	t.kick()
	t.mu.Lock()
	for t.flushing {
		t.flushed.Wait()
	}
	t.broken = true
	t.mu.Unlock()
}

// past is a deadline that has gone by.
var past = time.Unix(1, 0)

// settle is called by the reader before it waits: it flushes what the last
// frames made this side queue.
func (t *Conn) settle() {
	t.mu.Lock()
	t.feeding = false
	t.mu.Unlock()
	t.kick()
}

// remoteLastLocked is the last stream of the peer's that we acted on.
func (t *Conn) remoteLastLocked() uint32 {
	if t.client {
		return 0
	}
	return t.lastID
}

// Close ends the connection and all its streams at once. It does not wait for
// Run to return; Done tells.
func (t *Conn) Close() { t.fail(ErrClosed) }

// GoAway lets the streams that are open finish and takes no new ones: a client
// opens none, a server tells its client, leaves one round trip for what is
// under way (RFC 9113 section 6.8), then refuses. The connection ends with its last stream.
func (t *Conn) GoAway() {
	t.mu.Lock()
	if t.draining || t.err != nil {
		t.mu.Unlock()
		return
	}
	t.draining = true
	if !t.client {
		t.out = appendGoAway(t.out, 1<<31-1, http2.ErrCodeNo)
		t.out = appendPing(t.out, 0, drainPing)
	}
	over := t.overLocked()
	t.mu.Unlock()
	t.kick()
	if over {
		t.Close()
	}
}

// overLocked reports whether a draining connection has nothing left to do.
func (t *Conn) overLocked() bool {
	return t.draining && len(t.streams) == 0 && t.reserved == 0 && (t.client || t.final)
}

// Draining reports whether the connection takes no new streams any more.
func (t *Conn) Draining() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.draining || t.err != nil
}

// Streams is the number of open streams.
func (t *Conn) Streams() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.streams)
}

// Stats returns the counters so far.
func (t *Conn) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.stats
	s.Frames = t.frames
	return s
}

// Unread is how many received octets the sinks have not released yet.
func (t *Conn) Unread() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.unread
}

// Err is why the connection ended; nil while it lives.
func (t *Conn) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}
