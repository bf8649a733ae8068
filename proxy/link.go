package proxy

import (
	"errors"
	"io"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/h1"
	"ringfence.dev/proxy/socket"
)

// link is one relayed connection: two ends, and between them a filter or
// nothing. What comes from an end goes through the filter under the link's lock
// and then to the other end.
//
// A socket's octets are read by a goroutine (pump), which may wait when it
// writes; a tunnel stream's are pushed by the tunnel's reader, which may not.
// One goroutine owns the link: it sets it up, pumps, waits for the rest, and
// closes the ends.
type link struct {
	// Set before the link is in the scope's table, then read-only.
	scope   *Scope
	started time.Time
	carrier Carrier

	// mu held means the ports' queues and the filter agree on what comes next.
	mu       sync.Mutex
	cond     *sync.Cond
	down, up port // toward the client, toward the server
	conn     authz.Connection
	session  authz.Session
	filter   *h1.Conn // nil: opaque
	http     httpState
	live     bool          // octets may flow
	cut      bool          // reset both ends
	over     bool          // end without a reset, even though an end has not finished
	err      error         // why cut
	running  int           // goroutines beside the owner's
	quiet    time.Duration // for how long a half-closed link has been silent
	seen     uint64        // octets at the last tick
	linger   *time.Timer
	// Owned by the setting-up goroutine until the link is live, then read-only.
	own    *socket.Conn // the end that the owner's goroutine reads
	server *socket.Conn // nil behind a tunnel
	answer chan int     // status of our CONNECT, zero when it was reset
	shown  spiffeid.ID  // identity that the tunnel was made to; zero when it named no port
}

// Carrier is where a connection's bytes go.
type Carrier string

const (
	CarrierTunnel Carrier = "tunnel" // mutual TLS to or from the peer's agent
	CarrierPlain  Carrier = "plain"  // a peer without an agent
	CarrierLocal  Carrier = "local"  // both ends on this agent
)

// lingerTime is how long a client may go on sending after an answer that ends
// its connection, so that its unread octets do not turn into a reset that takes
// the answer with it (RFC 9112 section 9.6).
const lingerTime = 2 * time.Second

var outs = sync.Pool{New: func() any { return new(h1.Out) }}

func (s *Scope) newLink(carrier Carrier) *link {
	l := &link{scope: s, started: time.Now(), carrier: carrier}
	l.cond = sync.NewCond(&l.mu)
	return l
}

// attach makes a socket one of the link's ends.
func (p *port) attach(sock *socket.Conn) {
	p.to = sock
	p.wake = func() { _ = sock.SetDeadline(past) }
	p.drop = func(rst bool) {
		if rst {
			sock.Reset()
		} else {
			sock.Close()
		}
	}
}

var past = time.Unix(1, 0)

// pump reads a socket until it ends and passes on what it reads.
func (l *link) pump(p *port, sock *socket.Conn) {
	for {
		b, err := sock.Read()
		l.mu.Lock()
		switch {
		case err == nil:
			l.takeLocked(p, b.Bytes, true)
		case errors.Is(err, io.EOF):
			p.eof = true
			l.takeLocked(p, nil, true)
		case !l.over:
			l.cutLocked(err)
		}
		for p.hold && !l.overLocked() {
			l.cond.Wait()
		}
		stop := err != nil || l.cut
		l.mu.Unlock()
		b.Free()
		if stop {
			return
		}
	}
}

// takeLocked takes octets that came from p. wait says whether the caller may
// wait for the other end; mu is released meanwhile.
func (l *link) takeLocked(p *port, in []byte, wait bool) {
	p.bytes += uint64(len(in))
	if p.give != nil {
		p.owed += len(in)
	}
	switch {
	case l.cut || l.over:
		l.discardLocked(p)
		return
	case !l.live:
		p.carry = append(p.carry, in...)
		return
	}
	for l.filter != nil {
		if !l.stepLocked(p, in, wait) {
			return
		}
		// The other half can go on with what it had to leave.
		p, in, wait = l.other(p), nil, false
	}
	l.passLocked(p, in, wait)
}

// passLocked forwards octets unseen.
func (l *link) passLocked(p *port, in []byte, wait bool) {
	to := l.other(p)
	if len(p.carry) > 0 { // left from before the link was live
		in = append(p.carry, in...)
		p.carry = nil
	}
	if p.eof {
		to.fin = true
	}
	if len(in) > 0 {
		span := [1][]byte{in}
		l.forwardLocked(to, span[:], wait)
	}
	l.settleLocked(to)
	l.creditLocked(p)
}

func (l *link) forwardLocked(to *port, spans [][]byte, wait bool) {
	if wait {
		l.writeLocked(to, spans)
	} else {
		l.pushLocked(to, spans)
	}
}

// stepLocked runs the filter on octets from p and acts on what it gives. It
// reports whether the other half is to be stepped as well.
func (l *link) stepLocked(p *port, in []byte, wait bool) (wakeOther bool) {
	carried := len(p.carry) > 0
	if carried {
		p.carry = append(p.carry, in...)
		in = p.carry
	}
	out := outs.Get().(*h1.Out)
	step := l.filter.Upstream
	if p == &l.down {
		step = l.filter.Downstream
	}
	n, err := step(in, p.eof, out)
	// What the filter left must survive the caller's buffer. Spans may point
	// into the old carry, so it is not moved in place while they are in use.
	switch {
	case n == len(in):
		p.carry = nil
	case n > 0 || !carried:
		p.carry = append([]byte(nil), in[n:]...)
	}
	p.hold = out.Hold
	l.actLocked(p, out, err, wait)
	wakeOther = out.Wake && !l.cut && !l.over
	if wakeOther {
		l.other(p).hold = false
		l.cond.Broadcast()
	}
	outs.Put(out)
	l.creditLocked(p)
	return wakeOther
}

// actLocked sends what one step gave.
func (l *link) actLocked(p *port, out *h1.Out, err error, wait bool) {
	to := l.other(p)
	if len(out.Reply) > 0 {
		l.pushLocked(&l.down, out.Reply)
	}
	if out.ForwardEOF {
		to.fin = true
	}
	opaque := out.Opaque && len(p.carry) == 0 && len(to.carry) == 0
	if len(out.Forward) > 0 {
		l.forwardLocked(to, out.Forward, wait)
	}
	l.settleLocked(to)
	switch {
	case err != nil:
		l.cutLocked(err)
	case out.Close:
		l.endLocked()
	case opaque && l.filter != nil: // or the other half was quicker
		l.http.lax = l.filter.Lax()
		l.filter = nil
	}
}

// endLocked ends the link after what is queued for the client: the client gets
// FIN and a moment to notice, the server side is over.
func (l *link) endLocked() {
	if l.linger != nil || l.cut {
		return
	}
	l.down.fin, l.up.fin = true, true
	l.linger = time.AfterFunc(lingerTime, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.finishLocked()
	})
	l.settleLocked(&l.down)
	l.settleLocked(&l.up)
}

// finishLocked ends the link now, without a reset.
func (l *link) finishLocked() {
	if l.over || l.cut {
		return
	}
	l.over = true
	l.wakeLocked()
}

// cutLocked resets both ends. The owner does the closing; here they are only woken.
func (l *link) cutLocked(err error) {
	if l.cut {
		return
	}
	l.cut, l.err = true, err
	l.wakeLocked()
}

func (l *link) wakeLocked() {
	for _, p := range []*port{&l.down, &l.up} {
		if p.wake != nil {
			p.wake()
		}
		l.discardLocked(p)
	}
	l.cond.Broadcast()
}

// discardLocked drops what was read from p and gives its credit back, so that
// an ended link holds nothing of its tunnel.
func (l *link) discardLocked(p *port) {
	p.carry = nil
	if p.give != nil && p.owed > 0 {
		n := p.owed
		p.owed = 0
		p.give(n)
	}
}

func (l *link) overLocked() bool {
	return l.cut || l.over || (l.down.sent && l.up.sent && l.finishedReading())
}

// finishedReading: a client that got its answer and FIN may still be sending.
func (l *link) finishedReading() bool { return l.linger == nil || l.down.eof }

// begin lets octets flow, those first that came early.
func (l *link) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.live = true
	if l.err != nil {
		l.cutLocked(l.err) // a stream that was reset while the link was set up
	}
	if l.cut {
		l.wakeLocked() // the ends that came after
	}
	for _, p := range []*port{&l.down, &l.up} {
		if len(p.carry) > 0 || p.eof {
			l.takeLocked(p, nil, false)
		}
	}
}

// wait waits until the link is over in both directions, and closes its ends.
func (l *link) wait() {
	l.mu.Lock()
	for !l.overLocked() {
		l.cond.Wait()
	}
	if !l.cut && !l.over {
		l.over = true
		l.wakeLocked() // a pump that still reads
	}
	for l.running > 0 {
		l.cond.Wait()
	}
	rst := l.cut
	if l.linger != nil {
		l.linger.Stop()
	}
	l.mu.Unlock()
	for _, p := range []*port{&l.up, &l.down} {
		if p.drop != nil {
			p.drop(rst)
		}
	}
}

// abort cuts the link from outside.
func (l *link) abort(err error) {
	l.mu.Lock()
	l.cutLocked(err)
	l.mu.Unlock()
}
