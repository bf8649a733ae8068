package tunnel

import (
	"net/http"
	"strconv"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Stream is one carried connection. At most one goroutine writes to it at a
// time; Release, Reset and Close may be called by any.
type Stream struct {
	t    *Conn
	id   uint32
	sink Sink // set before the first frame

	// Guarded by t.mu.
	sendWindow int64
	recvWindow int64      // what the peer may still send
	window     int64      // the credit it has when all is released
	credit     int64      // released, not yet returned
	taken      int64      // released since the window last grew
	unread     int64      // received, not released
	writable   *sync.Cond // made when first waited for
	answered   bool       // client: the final response came; server: it was sent
	localEnd   bool
	remoteEnd  bool
	over       bool // in neither direction any more
	held       bool // server: the handler is not done with it
	queued     bool // in t.waiting
}

// Conn is the tunnel that carries the stream.
func (s *Stream) Conn() *Conn { return s.t }

// Reserve promises a slot for one stream to be opened with Open, or given back
// with Unreserve. It returns [ErrBusy] or [ErrDraining] when there is none.
func (t *Conn) Reserve(limit int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.draining || t.err != nil || t.nextID > 1<<31-1-2*maxStreams {
		return ErrDraining
	}
	if n := len(t.streams) + t.reserved; n >= limit || uint32(n) >= t.peerStreams {
		return ErrBusy
	}
	t.reserved++
	return nil
}

// takesStreams reports whether a fresh connection is of any use.
func (t *Conn) takesStreams() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err == nil && !t.draining && t.peerStreams > 0
}

// Unreserve gives back a promised slot that is not going to be used.
func (t *Conn) Unreserve() {
	t.mu.Lock()
	t.reserved--
	over := t.overLocked()
	t.mu.Unlock()
	if over {
		t.Close()
	}
}

// Open sends a CONNECT in a slot promised by Reserve. The answer comes to the sink.
func (t *Conn) Open(r *Request, sink Sink) (*Stream, error) {
	t.mu.Lock()
	t.reserved--
	if t.err != nil || t.draining {
		over := t.overLocked()
		t.mu.Unlock()
		if over {
			t.Close()
		}
		return nil, ErrDraining
	}
	s := t.newStreamLocked(t.nextID, sink)
	t.lastID = t.nextID
	t.nextID += 2
	t.appendBlockLocked(s.id, t.encodeLocked(r), 0)
	mine, alone := t.claimLocked()
	t.mu.Unlock()
	if mine {
		t.gather(alone)
	}
	return s, nil
}

func (t *Conn) newStreamLocked(id uint32, sink Sink) *Stream {
	s := &Stream{
		t: t, id: id, sink: sink,
		sendWindow: t.peerInitial, recvWindow: initialWindow, window: initialWindow,
	}
	t.streams[id] = s
	t.stats.Opened++
	t.idleFor = 0
	return s
}

// onRequest opens a stream of the peer's.
func (t *Conn) onRequest(id uint32, b *headerBlock) error {
	t.mu.Lock()
	t.frames++
	if s := t.streams[id]; s != nil {
		return t.trailersLocked(s, b)
	}
	if id%2 == 0 || id <= t.lastID {
		t.mu.Unlock()
		if id%2 == 1 {
			return nil // trailers of a stream that we reset a moment ago
		}
		return protocolError("stream id is not the client's")
	}
	t.lastID = id
	if t.final || t.held >= maxStreams {
		defer t.mu.Unlock()
		return t.refuseLocked(id)
	}
	s := t.newStreamLocked(id, nil)
	s.held = true
	t.held++
	if b.bad {
		defer t.mu.Unlock()
		s.resetLocked(http2.ErrCodeProtocol)
		s.doneLocked()
		return t.answerLocked(frameHeaderLen + 4)
	}
	t.mu.Unlock()
	request := b.request
	s.sink = t.handler(s, &request)
	if b.end {
		s.ended()
	}
	return nil
}

// refuseLocked answers a stream beyond the limit. A peer that goes on opening
// streams into refusals is flooding (rapid reset, CVE-2023-44487, ends here too:
// a reset stream counts as held until its handler is done).
func (t *Conn) refuseLocked(id uint32) error {
	t.out = appendReset(t.out, id, http2.ErrCodeRefusedStream)
	if t.counts.refused++; t.counts.refused > maxRefusals {
		return floodError("flood of streams past the limit")
	}
	return t.answerLocked(frameHeaderLen + 4)
}

// trailersLocked takes a second header block on a stream, which can only be
// trailers and so must end it (RFC 9113 section 8.1). It releases mu.
func (t *Conn) trailersLocked(s *Stream, b *headerBlock) error {
	if !b.end || s.remoteEnd {
		s.resetLocked(http2.ErrCodeProtocol)
		t.mu.Unlock()
		return nil
	}
	t.mu.Unlock()
	s.ended()
	return nil
}

// onResponse takes the peer's answer to a CONNECT.
func (t *Conn) onResponse(id uint32, b *headerBlock) error {
	t.mu.Lock()
	t.frames++
	s := t.streams[id]
	if s == nil {
		idle := t.idleLocked(id)
		t.mu.Unlock()
		if idle {
			return protocolError("HEADERS on an idle stream")
		}
		return nil
	}
	if s.answered {
		return t.trailersLocked(s, b)
	}
	if b.bad || b.status == 0 || (b.end && b.status < 200) {
		s.resetLocked(http2.ErrCodeProtocol)
		t.mu.Unlock()
		return nil
	}
	if b.status < 200 {
		t.mu.Unlock()
		return nil // interim
	}
	s.answered = true
	t.mu.Unlock()
	s.sink.OnResponse(b.status)
	if b.end {
		s.ended()
	}
	return nil
}

// Respond answers the peer's CONNECT: 200 opens the stream, anything else ends it.
func (s *Stream) Respond(status int) {
	t := s.t
	t.mu.Lock()
	if s.answered || s.over || t.err != nil {
		t.mu.Unlock()
		return
	}
	s.answered = true
	t.encBuf.Reset()
	_ = t.enc.WriteField(hpack.HeaderField{Name: ":status", Value: strconv.Itoa(status)})
	var flags http2.Flags
	if status != http.StatusOK {
		flags = http2.FlagHeadersEndStream
	}
	t.appendBlockLocked(s.id, t.encBuf.Bytes(), flags)
	if status != http.StatusOK {
		s.localEnd = true
		// RFC 9113 section 8.1: the request's rest is not wanted, and that is no error.
		if !s.remoteEnd {
			t.out = appendReset(t.out, s.id, http2.ErrCodeNo)
		}
		s.overLocked()
	}
	flood := len(t.out) > maxPending+maxAnswers
	mine, alone := t.claimLocked()
	t.mu.Unlock()
	if flood {
		t.fail(floodError("peer does not read our answers"))
	}
	if mine {
		t.gather(alone)
	}
}

// ended tells the sink of the peer's END_STREAM.
func (s *Stream) ended() {
	t := s.t
	t.mu.Lock()
	if s.over || s.remoteEnd {
		t.mu.Unlock()
		return
	}
	s.remoteEnd = true
	if s.localEnd {
		s.overLocked()
	}
	over := t.overLocked()
	t.mu.Unlock()
	s.sink.OnEnd()
	if over {
		t.kick()
		t.Close()
	}
}

// overLocked takes the stream off the connection and ends waiting writers.
func (s *Stream) overLocked() {
	if s.over {
		return
	}
	s.over = true
	delete(s.t.streams, s.id)
	s.t.grown -= s.window - initialWindow
	s.t.unread -= s.unread
	s.unread = 0
	s.wakeLocked()
}

// resetLocked ends the stream with RST_STREAM. The sink is not told.
func (s *Stream) resetLocked(code http2.ErrCode) {
	if s.over {
		return
	}
	s.t.out = appendReset(s.t.out, s.id, code)
	s.overLocked()
}

// Reset ends the stream in both directions at once with RST_STREAM; what was
// received and not released is lost. The sink hears no more of it, except what
// the reader is delivering just now.
func (s *Stream) Reset(code http2.ErrCode) {
	t := s.t
	t.mu.Lock()
	s.resetLocked(code)
	over := t.overLocked()
	t.mu.Unlock()
	t.kick()
	if over {
		t.Close()
	}
}

// Close says that this side is done with the stream. One that is still open is
// reset. It is called once for every stream, whatever its end.
func (s *Stream) Close() {
	t := s.t
	t.mu.Lock()
	s.resetLocked(http2.ErrCodeCancel)
	s.doneLocked()
	over := t.overLocked()
	t.mu.Unlock()
	t.kick()
	if over {
		t.Close()
	}
}

func (s *Stream) doneLocked() {
	if s.held {
		s.held = false
		s.t.held--
	}
}

// Release says that n octets given to the sink are out of its hands, and so may be replaced.
func (s *Stream) Release(n int) {
	t := s.t
	t.mu.Lock()
	if s.over || n == 0 {
		t.mu.Unlock()
		return
	}
	s.unread -= int64(n)
	t.unread -= int64(n)
	s.credit += int64(n)
	s.taken += int64(n)
	if s.remoteEnd || s.credit < s.window/2 {
		t.mu.Unlock()
		return
	}
	s.growLocked()
	t.out = appendWindowUpdate(t.out, s.id, s.credit)
	s.recvWindow += s.credit
	s.credit = 0
	t.mu.Unlock()
	t.kick() // does nothing for the reader, which flushes before it waits
}

// growLocked doubles the credit of a stream whose reader has taken all of it and
// owes next to nothing, as long as the connection's budget lasts.
func (s *Stream) growLocked() {
	if s.taken < s.window || s.unread > s.window/8 || s.window >= maxWindow ||
		s.t.grown+s.window > growthBudget {
		return
	}
	s.taken = 0
	s.t.grown += s.window
	s.credit += s.window
	s.window *= 2
}
