package tunnel

import (
	"sync"

	"golang.org/x/net/http2"
)

// WriteAll sends spans in order, waiting for credit and room as long as it
// takes. It keeps none of them. Its error is why the stream or the connection ended.
func (s *Stream) WriteAll(spans [][]byte) error {
	c := newCursor(spans)
	t := s.t
	t.mu.Lock()
	for c.left > 0 {
		n := s.roomLocked(c.left)
		if n < 0 {
			t.mu.Unlock()
			return s.endedError()
		}
		if n == 0 {
			s.waitLocked()
			continue
		}
		if t.flushing || n < directSize {
			t.appendDataLocked(s, &c, n)
			continue
		}
		t.flushing = true
		t.direct(s, &c, n) // releases mu
		t.mu.Lock()
	}
	s.finishLocked()
	return nil
}

// TryWrite sends as much of spans as credit and room allow and returns how many
// octets that was; none is no error.
func (s *Stream) TryWrite(spans [][]byte) (int, error) {
	c := newCursor(spans)
	total := c.left
	t := s.t
	t.mu.Lock()
	for c.left > 0 {
		n := s.roomLocked(c.left)
		if n < 0 {
			t.mu.Unlock()
			return total - c.left, s.endedError()
		}
		if n == 0 {
			break
		}
		t.appendDataLocked(s, &c, n)
	}
	if t.feeding {
		t.mu.Unlock() // the reader, perhaps the caller, flushes before it waits
		return total - c.left, nil
	}
	s.finishLocked()
	return total - c.left, nil
}

// finishLocked flushes unless somebody is about to. It releases mu.
func (s *Stream) finishLocked() {
	t := s.t
	if len(t.out) == 0 {
		t.mu.Unlock()
		return
	}
	mine, alone := t.claimLocked()
	t.mu.Unlock()
	if mine {
		t.gather(alone)
	}
}

// CloseWrite sends END_STREAM after what was written.
func (s *Stream) CloseWrite() error {
	t := s.t
	t.mu.Lock()
	if s.over || s.localEnd || t.err != nil {
		t.mu.Unlock()
		return nil
	}
	s.localEnd = true
	t.out = appendHeader(t.out, 0, http2.FrameData, http2.FlagDataEndStream, s.id)
	if s.remoteEnd {
		s.overLocked()
	}
	over := t.overLocked()
	t.mu.Unlock()
	t.kick()
	if over {
		t.Close()
	}
	return nil
}

// roomLocked is how many octets of want may be sent now: 0 to wait, less than 0
// when never.
func (s *Stream) roomLocked(want int) int {
	t := s.t
	if s.over || s.localEnd || t.err != nil {
		return -1
	}
	room := min(int64(want), s.sendWindow, t.sendWindow, int64(t.peerFrame), int64(maxPending-len(t.out)))
	return max(0, int(room))
}

func (s *Stream) endedError() error {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	if s.t.err != nil {
		return s.t.err
	}
	return ErrClosed
}

// waitLocked waits until something has changed for the stream. What it has
// queued is flushed first, or the peer would have no reason to give credit.
func (s *Stream) waitLocked() {
	t := s.t
	if len(t.out) > 0 && !t.flushing {
		t.flushing = true
		t.mu.Unlock()
		t.flush()
		t.mu.Lock()
		return // and look again
	}
	if s.writable == nil {
		s.writable = sync.NewCond(&t.mu)
	}
	if s.sendWindow > 0 && !s.queued {
		s.queued = true
		t.waiting = append(t.waiting, s) // for the connection's credit or room, not its own
	}
	s.writable.Wait()
}

func (s *Stream) wakeLocked() {
	if s.writable != nil {
		s.writable.Broadcast()
	}
}

// spendLocked takes the credit for n octets and returns their frame's header.
func (t *Conn) spendLocked(s *Stream, b []byte, n int) []byte {
	s.sendWindow -= int64(n)
	t.sendWindow -= int64(n)
	t.stats.BytesOut += uint64(n)
	return appendHeader(b, n, http2.FrameData, 0, s.id)
}

func (t *Conn) appendDataLocked(s *Stream, c *cursor, n int) {
	t.out = t.spendLocked(s, t.out, n)
	for n > 0 {
		p := c.next(n)
		t.out = append(t.out, p...)
		n -= len(p)
	}
}

// direct sends one frame without gathering it: small spans join what is queued,
// and from a large one only as much is copied as fills a TLS record; the rest
// goes to TLS from where it is. The caller holds mu and has claimed the flush;
// direct releases both.
func (t *Conn) direct(s *Stream, c *cursor, n int) {
	t.out = t.spendLocked(s, t.out, n)
	out := t.takeLocked()
	t.mu.Unlock()
	var err error
	for n > 0 && err == nil {
		p := c.next(n)
		n -= len(p)
		if len(p) < directSize {
			out = append(out, p...)
			continue
		}
		fill := min(len(p), (recordSize-len(out)%recordSize)%recordSize)
		out = append(out, p[:fill]...)
		p = p[fill:]
		whole := len(p) - len(p)%recordSize
		if whole > 0 {
			if err = t.seal(out); err == nil {
				err = t.seal(p[:whole])
			}
			out = out[:0]
		}
		out = append(out, p[whole:]...)
	}
	if err == nil {
		err = t.seal(out)
	}
	t.giveBack(out)
	if t.pushed(err) {
		t.flush()
	}
}

// cursor walks over spans that belong to somebody else without changing them.
type cursor struct {
	spans [][]byte
	off   int // consumed part of spans[0]
	left  int // octets in all
}

func newCursor(spans [][]byte) cursor {
	c := cursor{spans: spans}
	for _, p := range spans {
		c.left += len(p)
	}
	return c
}

// next consumes and returns the next octets, at most n and at most one span.
func (c *cursor) next(n int) []byte {
	for c.off == len(c.spans[0]) {
		c.spans, c.off = c.spans[1:], 0
	}
	p := c.spans[0][c.off:]
	p = p[:min(len(p), n)]
	c.off += len(p)
	c.left -= len(p)
	return p
}
