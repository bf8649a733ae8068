package proxy

import (
	"ringfence.dev/proxy/socket"
)

// writer is the write half of a link's end: a socket or a tunnel stream.
// TryWrite never waits, WriteAll does; neither keeps the spans.
type writer interface {
	TryWrite(spans [][]byte) (int, error)
	WriteAll(spans [][]byte) error
	CloseWrite() error
}

// port is one end of a link. Everything is guarded by the link's lock, except
// that whoever has set busy writes to the end with the lock released. So bytes
// for one end keep their order, whoever they come from.
type port struct {
	to writer // nil until the end is there

	busy   bool             // somebody writes outside of the lock
	queue  []*socket.Buffer // behind what is being written
	queued int              // octets in queue and in the drainer's hands
	fin    bool             // half-close once all is written
	sent   bool             // half-closed

	// What was read from this end.
	carry []byte         // octets the filter did not take yet
	hold  bool           // the filter wants no more from here for now
	eof   bool           // the end sends no more
	owed  int            // octets received whose credit was not returned; push ends only
	give  func(n int)    // returns credit; nil for sockets, which are simply not read
	wake  func()         // ends waits in the end's calls
	drop  func(rst bool) // closes the end for good; called once, by the link's own goroutine
	bytes uint64         // read from this end
}

// pushLocked writes spans without waiting; what is not taken at once is copied
// and left to a goroutine. For callers that must not wait.
func (l *link) pushLocked(p *port, spans [][]byte) {
	if p.busy || p.to == nil {
		p.enqueue(spans, 0)
		return
	}
	n, err := p.to.TryWrite(spans)
	if err != nil {
		l.cutLocked(err)
		return
	}
	if p.enqueue(spans, n); p.queued > 0 {
		p.busy = true
		l.running++
		go l.drain(p)
	}
}

// enqueue copies spans, without the first skip octets, behind the queue. Its
// bound is the credit that the other end was given: an end that pushes is only
// given credit for what has left the queue, and a filter adds little.
func (p *port) enqueue(spans [][]byte, skip int) {
	for _, s := range spans {
		if skip >= len(s) {
			skip -= len(s)
			continue
		}
		s, skip = s[skip:], 0
		for len(s) > 0 {
			last := len(p.queue) - 1
			if last < 0 || len(p.queue[last].Room()) == 0 {
				p.queue = append(p.queue, socket.Borrow(socket.Small))
				last++
			}
			b := p.queue[last]
			n := copy(b.Room(), s)
			b.Grow(n)
			p.queued += n
			s = s[n:]
		}
	}
}

// drain writes a port's queue in place of somebody who must not wait, and is
// gone when it is empty.
func (l *link) drain(p *port) {
	l.mu.Lock()
	l.emptyLocked(p)
	p.busy = false
	l.running--
	l.settleLocked(p)
	l.cond.Broadcast()
	l.mu.Unlock()
}

// emptyLocked writes the queue until nothing is left. The caller has set busy;
// mu is released while writing.
func (l *link) emptyLocked(p *port) {
	for len(p.queue) > 0 && !l.cut {
		batch := p.queue[:min(len(p.queue), maxBatch)]
		p.queue = p.queue[len(batch):]
		l.mu.Unlock()
		err := writeBatch(p.to, batch)
		l.mu.Lock()
		p.free(batch)
		if err != nil {
			l.cutLocked(err)
		}
		l.creditLocked(l.other(p))
	}
	p.free(p.queue)
	p.queue = nil
}

// maxBatch is how many buffers are written before their credit is returned: a
// slow reader's window is refilled in steps of 64 KiB, not all at the end.
const maxBatch = 4

func writeBatch(to writer, batch []*socket.Buffer) error {
	var spans [maxBatch][]byte
	for i, b := range batch {
		spans[i] = b.Bytes
	}
	return to.WriteAll(spans[:len(batch)])
}

func (p *port) free(batch []*socket.Buffer) {
	for i, b := range batch {
		p.queued -= len(b.Bytes)
		b.Free()
		batch[i] = nil
	}
}

// writeLocked writes spans, waiting as long as it takes with mu released. For
// an end's own goroutine. What others queue meanwhile goes right behind.
func (l *link) writeLocked(p *port, spans [][]byte) {
	for p.busy && !l.cut {
		l.cond.Wait()
	}
	if l.cut || len(spans) == 0 {
		return
	}
	p.busy = true
	l.mu.Unlock()
	err := p.to.WriteAll(spans)
	l.mu.Lock()
	if err != nil {
		l.cutLocked(err)
	}
	l.emptyLocked(p)
	p.busy = false
	l.settleLocked(p)
	l.cond.Broadcast()
}

// settleLocked half-closes an end that is owed nothing more.
func (l *link) settleLocked(p *port) {
	if !p.fin || p.sent || p.busy || p.to == nil || l.cut {
		return
	}
	p.sent = true
	// Where nothing is left in either direction, closing follows at once and says the same.
	if last := l.other(p).sent && l.down.eof && l.up.eof; !last || p.give != nil {
		if err := p.to.CloseWrite(); err != nil {
			l.cutLocked(err)
		}
	}
	l.cond.Broadcast()
}

// creditLocked returns credit for what was read from p and has left the link.
func (l *link) creditLocked(p *port) {
	if p.give == nil {
		return
	}
	left := l.other(p).queued + len(p.carry)
	if n := p.owed - left; n > 0 {
		p.owed -= n
		p.give(n)
	}
}

func (l *link) other(p *port) *port {
	if p == &l.down {
		return &l.up
	}
	return &l.down
}
