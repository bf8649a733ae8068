package policy

import (
	"sync"
	"time"

	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

// session decides one connection. One goroutine at a time uses it.
type session struct {
	engine     *Engine
	conn       authz.Connection
	key        pairKey
	separators bool
	pair       *pair  // under the snapshot last used
	seq        uint32 // of the last request
	asked      bool   // Connect has recorded an outcome
	opaque     bool   // the service was not HTTP-only when Connect was first asked
	effect     authz.Effect
}

// current returns the pair under the newest snapshot. All of one decision uses
// the pair it returns, so that one snapshot decides.
func (s *session) current() *pair {
	if snap := s.engine.snap.Load(); s.pair.snap != snap {
		s.pair = snap.pair(s.key)
	}
	return s.pair
}

// Connect implements [authz.Session].
func (s *session) Connect() (authz.Decision, error) {
	p := s.current()
	v := &p.connect
	if !s.asked {
		s.opaque = !p.httpOnly
	} else if s.outgrown(p) {
		v = &verdict{forbidden: true, reason: "the service has become HTTP only", action: v.action}
	}
	id := authz.ID{Conn: s.conn.ID.Conn}
	effect := effectOf(s.conn.Mode, v)
	if s.asked && effect == s.effect {
		return s.decision(id, effect, v), nil
	}
	d := s.conclude(id, effect, p, v, nil)
	s.asked, s.effect = true, effect
	return d, nil
}

// outgrown reports whether a connection was opened to carry anything, has never
// shown a request, and is now on an HTTP-only service: what it carries would
// pass by the policies. Beside the caller nobody decides requests anyway.
func (s *session) outgrown(p *pair) bool {
	return s.opaque && p.httpOnly && s.seq == 0 && s.conn.Side != authz.Egress
}

// Request implements [authz.Session]. On a service that is not HTTP-only the
// connection's own outcome is the answer.
func (s *session) Request(r *authz.Request) (authz.Decision, error) {
	p := s.current()
	v := p.request(r, s.separators)
	return s.conclude(s.next(), effectOf(s.conn.Mode, v), p, v, r), nil
}

// HTTPOnly implements [authz.Session], under the newest policies.
func (s *session) HTTPOnly() bool { return s.current().httpOnly }

// Refuse implements [authz.Session]. reason must not hold text of a peer's
// choice beyond a short phrase; it is recorded escaped.
func (s *session) Refuse(reason string) authz.Decision {
	v := verdict{reason: reason, action: refused, forbidden: true}
	return s.conclude(s.next(), effectOf(s.conn.Mode, &v), s.current(), &v, nil)
}

// next numbers requests. After four billion of them it begins again at one,
// because zero means the connection.
func (s *session) next() authz.ID {
	if s.seq++; s.seq == 0 {
		s.seq = 1
	}
	return authz.ID{Conn: s.conn.ID.Conn, Seq: s.seq}
}

// effectOf applies a scope's mode. A policy in dry-run that would refuse what is
// otherwise permitted makes it a WouldDeny even in an enforcing scope.
func effectOf(mode authz.Mode, v *verdict) authz.Effect {
	switch {
	case v.allowed && v.shadowed:
		return authz.WouldDeny
	case v.allowed:
		return authz.Permit
	case mode == authz.Enforce:
		return authz.Deny
	}
	return authz.WouldDeny
}

func (s *session) decision(id authz.ID, effect authz.Effect, v *verdict) authz.Decision {
	d := authz.Decision{
		ID:              id,
		Effect:          effect,
		Policies:        v.policies,
		Reason:          v.reason,
		Unauthenticated: !v.allowed && v.action != refused && s.conn.Source.ID.IsZero(),
	}
	if v.allowed && v.shadowed {
		d.Policies, d.Reason = v.shadowPolicies, v.shadowReason
	}
	return d
}

// conclude counts and records a decision and returns it.
func (s *session) conclude(id authz.ID, effect authz.Effect, p *pair, v *verdict, r *authz.Request) authz.Decision {
	d := s.decision(id, effect, v)
	err := s.record(&d, p, v, r)
	if err != nil {
		s.engine.counts.unrecorded.Add(1)
		if s.engine.cfg.RefuseUnrecorded && s.conn.Mode == authz.Enforce {
			d.Effect, d.Policies, d.Reason = authz.Deny, nil, "the decision could not be recorded"
		}
	}
	s.engine.count(d.Effect, v.failed)
	return d
}

func (e *Engine) count(effect authz.Effect, failed bool) {
	switch effect {
	case authz.Permit:
		e.counts.permits.Add(1)
	case authz.WouldDeny:
		e.counts.wouldDenies.Add(1)
	default:
		e.counts.denies.Add(1)
	}
	if failed {
		e.counts.failures.Add(1)
	}
}

// records spares an allocation per decision: a record handed to an interface
// lives on the heap. What a record in the pool still refers to is small and long-lived, or collected
// with the pool.
var records = sync.Pool{New: func() any { return new(decisionlog.Record) }}

func (s *session) record(d *authz.Decision, p *pair, v *verdict, r *authz.Request) error {
	if s.engine.cfg.Log == nil {
		return nil
	}
	c := &s.conn
	rec := records.Get().(*decisionlog.Record)
	defer records.Put(rec)
	*rec = decisionlog.Record{
		Time: time.Now(), ID: d.ID, Scope: c.Scope, Side: c.Side, Mode: c.Mode, Effect: d.Effect,
		Principal: p.caller, Source: c.Source.Addr, Destination: c.Destination.Addr,
		Unit: c.Source.Unit, Exe: c.Source.Exe, PID: c.Source.PID, UID: c.Source.UID, Mesh: c.Mesh,
		Action: v.action, Resource: string(p.resource.entity.UID.ID),
		Policies: d.Policies, Reason: d.Reason, Version: p.snap.version,
	}
	if r != nil {
		rec.Method, rec.Host, rec.Path, rec.Upgrade = r.Method, v.host, v.path, r.Upgrade
	}
	if v.shadowed {
		rec.DryRunPolicies, rec.DryRunEffect = v.shadowPolicies, "permit"
		if v.allowed {
			rec.DryRunEffect = "deny"
		}
	}
	return s.engine.cfg.Log.Record(rec)
}
