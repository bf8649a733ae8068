package tunnel

import "runtime"

// kick flushes what is queued, unless somebody else is about to.
func (t *Conn) kick() {
	t.mu.Lock()
	if t.flushing || t.feeding || t.broken || (len(t.out) == 0 && !t.record.pending()) {
		t.mu.Unlock()
		return
	}
	t.flushing = true
	t.mu.Unlock()
	t.flush()
}

// claimLocked makes the caller the one who flushes, if nobody is. alone means
// that no other stream can be about to write, so that waiting for company is idle.
func (t *Conn) claimLocked() (mine, alone bool) {
	if t.flushing {
		return false, false
	}
	t.flushing = true
	return true, len(t.streams) < 2
}

// gather yields once, so that goroutines made runnable by the same turn of
// the poller add their frames, then flushes them all. The caller has claimed the flush.
func (t *Conn) gather(alone bool) {
	if !alone {
		runtime.Gosched()
	}
	t.flush()
}

// flush writes out until nothing is left. The caller has set flushing; flush
// unsets it, or leaves it to a goroutine that waits for the socket.
func (t *Conn) flush() {
	for {
		t.mu.Lock()
		if t.broken || (len(t.out) == 0 && !t.record.pending()) {
			t.restLocked()
			t.mu.Unlock()
			return
		}
		out := t.takeLocked()
		t.mu.Unlock()
		err := t.seal(out)
		t.giveBack(out)
		if !t.pushed(err) {
			return
		}
	}
}

// takeLocked takes over what is queued and lets writers fill the other buffer.
func (t *Conn) takeLocked() []byte {
	out := t.out
	t.out, t.spare = t.spare[:0], nil
	t.answers = 0
	t.stats.Flushes++
	t.wakeLocked()
	return out
}

// giveBack keeps a flushed buffer for the next turn. A busy tunnel so comes to
// two that are large enough; keepAlive lets them go when it falls silent.
func (t *Conn) giveBack(out []byte) {
	t.mu.Lock()
	t.spare = out[:0]
	t.mu.Unlock()
}

func (t *Conn) seal(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	return t.record.write(p)
}

// pushed gives the kernel what was sealed and reports whether the caller may go
// on flushing. err is the sealing's.
func (t *Conn) pushed(err error) bool {
	blocked := false
	if err == nil {
		blocked, err = t.record.push()
	}
	if err != nil {
		t.breakOff(err)
		return false
	}
	if blocked {
		// Run waits for drains after it has closed the socket, which ends every
		// wait below; adding is safe because a claim is held while Run lives.
		t.drains.Add(1)
		go t.drain()
		return false
	}
	return true
}

// restLocked ends the caller's turn at flushing.
func (t *Conn) restLocked() {
	t.flushing = false
	t.flushed.Broadcast()
}

// breakOff ends the connection because it cannot be written to.
func (t *Conn) breakOff(err error) {
	t.fail(err)
	t.mu.Lock()
	t.broken = true
	t.out = nil
	t.restLocked()
	t.mu.Unlock()
}

// drain waits, in place of the writer or reader that met a full socket, until
// it has room again, and goes on flushing.
func (t *Conn) drain() {
	defer t.drains.Done()
	if err := t.record.drain(); err != nil {
		t.breakOff(err)
		return
	}
	t.flush()
}

// wakeLocked lets writers try again that waited for connection credit or room.
func (t *Conn) wakeLocked() {
	for i, s := range t.waiting {
		s.queued = false
		s.wakeLocked()
		t.waiting[i] = nil
	}
	t.waiting = t.waiting[:0]
}
