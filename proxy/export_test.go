package proxy

import "time"

// Tick makes a scope's links older by d, as its ticker would.
func (s *Scope) Tick(d time.Duration) {
	for _, l := range s.live() {
		l.tick(d)
	}
}
