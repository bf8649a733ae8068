package proxy

import (
	"errors"
	"time"

	"ringfence.dev/policy/authz"
)

var (
	errRevoked = errors.New("policy no longer permits the connection")
	errHalf    = errors.New("half-closed and silent for too long")
)

// reevaluate decides a live link again and resets it if it is no longer
// permitted.
func (l *link) reevaluate() (cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.decideLocked()
}

func (l *link) decideLocked() (cut bool) {
	if l.cut || l.over {
		return false
	}
	d, err := l.session.Connect()
	if err != nil {
		l.scope.relay.count.undecided.Add(1)
		d = l.session.Refuse("live connection could not be decided: " + err.Error())
	}
	if d.Allowed() {
		return false
	}
	l.scope.relay.count.denied.Add(1)
	l.cutLocked(errRevoked)
	return true
}

// setMode takes a live link into another mode.
func (l *link) setMode(m authz.Mode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut || l.over || l.conn.Mode == m {
		return
	}
	l.conn.Mode = m
	if l.filter != nil {
		l.filter.Configure(l.scope.filtering(l.http.only, m))
		l.http.lax = l.filter.Lax()
	}
	session, err := l.scope.relay.open(l.conn)
	if err != nil {
		if m == authz.Enforce {
			l.cutLocked(errRevoked)
		}
		return
	}
	l.session = session
	if l.decideLocked() || m != authz.Enforce {
		return
	}
	if l.http.lax || (session.HTTPOnly() && !l.http.only) {
		// It goes on as opaque, or was never asked about its requests: dry-run
		// could let that pass, enforce cannot.
		l.cutLocked(errRevoked)
	}
}

// tick is called every so often: it resets a half-closed link that has been
// silent for too long. Links that both sides hold open have no limit.
func (l *link) tick(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	octets := l.down.bytes + l.up.bytes
	half := l.down.eof || l.up.eof
	if !half || octets != l.seen {
		l.seen, l.quiet = octets, 0
		return
	}
	if l.quiet += d; l.quiet >= l.scope.relay.cfg.HalfClosedIdle {
		l.cutLocked(errHalf)
	}
}
