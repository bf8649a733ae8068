package svid

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// atOnce bounds how many SVIDs are renewed at the same time, so that a slow
	// issuer does not delay the next one, and a thousand that fall due together
	// (after a suspend, say) do not take the CPU from traffic.
	atOnce = 4
	// longestNap bounds how long Run sleeps: timers stand still while the machine
	// is suspended, certificates do not.
	longestNap = time.Minute
)

// Run renews SVIDs at half their life until ctx ends, then closes the Store. One
// that nobody has asked for since it was made is left to expire and then
// forgotten, unless it is wanted before. After a failure the last good one stays in use, and it is tried again
// with growing pauses of at most 30 s. It returns nil.
func (s *Store) Run(ctx context.Context) error {
	defer s.Close()
	timer := time.NewTimer(longestNap)
	defer timer.Stop()
	for {
		timer.Reset(s.renewDue(time.Now()))
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake: // every end of an attempt is one, so slots are refilled
		case <-timer.C:
		}
	}
}

// renewDue starts what is due, and tells how long to sleep.
func (s *Store) renewDue(now time.Time) time.Duration {
	nap, dropped := s.startDue(wall(now))
	for _, id := range dropped {
		s.cfg.Log.Debug("unused SVID dropped", "id", id)
		s.cfg.OnRenew(id)
	}
	return nap
}

func (s *Store) startDue(now time.Time) (nap time.Duration, dropped []spiffeid.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) > 0 && !s.queue[0].due.After(now) && !s.closed {
		if s.renewals >= atOnce {
			return longestNap, dropped // the end of one of them wakes us
		}
		e := s.queue[0]
		s.queue.drop(e)
		if s.tendLocked(e, now) {
			dropped = append(dropped, e.id)
		}
	}
	if len(s.queue) == 0 {
		return longestNap, dropped
	}
	return min(longestNap, s.queue[0].due.Sub(now)), dropped
}

// tendLocked deals with an entry whose time has come, and has been taken out of
// the queue. It reports whether the entry was forgotten.
func (s *Store) tendLocked(e *entry, now time.Time) (forgotten bool) {
	switch {
	case e.mint != nil:
		// It had expired and a caller is having it made anew, which queues it.
	case !e.unusedLocked() || (e.failures > 0 && e.valid(now)):
		s.startLocked(e, true)
	case e.valid(now):
		// Kept to its end all the same: it may be wanted while the issuer is down.
		e.asleep.Store(true)
		s.queue.set(e, e.current.Load().notAfter)
	default:
		s.forgetLocked(e)
		return true
	}
	return false
}

// rouse has an SVID renewed that was left to itself at its half-life.
func (s *Store) rouse(e *entry, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[e.id] != e || !e.asleep.CompareAndSwap(true, false) {
		return
	}
	e.lastUsed.Store(now.UnixNano())
	s.queue.set(e, wall(now))
	s.nudge()
}
