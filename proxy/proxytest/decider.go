package proxytest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
)

// Identifier names workloads from two tables. Asking for what is in neither
// is ErrUnknown.
type Identifier struct {
	mu      sync.Mutex
	callers map[uint32]workload.Identity // by uid of the evidence
	owners  map[uint16]workload.Identity // by port
	sole    workload.Identity
	Calls   atomic.Int64
}

// NewIdentifier knows nobody yet.
func NewIdentifier() *Identifier {
	return &Identifier{callers: map[uint32]workload.Identity{}, owners: map[uint16]workload.Identity{}}
}

// SetCaller makes connections opened by uid belong to who.
func (i *Identifier) SetCaller(uid uint32, who workload.Identity) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.callers[uid] = who
}

// SetOwner makes port belong to who.
func (i *Identifier) SetOwner(port uint16, who workload.Identity) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.owners[port] = who
}

// SetSole sets whom peers without SNI get.
func (i *Identifier) SetSole(who workload.Identity) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.sole = who
}

// Caller implements proxy.Identifier.
func (i *Identifier) Caller(ctx context.Context, f flow.Flow) (workload.Identity, error) {
	i.Calls.Add(1)
	i.mu.Lock()
	defer i.mu.Unlock()
	return known(i.callers, f.Caller.UID, ctx)
}

// Owner implements proxy.Identifier.
func (i *Identifier) Owner(ctx context.Context, _ string, addr netip.AddrPort) (workload.Identity, error) {
	i.Calls.Add(1)
	i.mu.Lock()
	defer i.mu.Unlock()
	return known(i.owners, addr.Port(), ctx)
}

// Sole implements proxy.Identifier.
func (i *Identifier) Sole(ctx context.Context, _ string) (workload.Identity, error) {
	i.Calls.Add(1)
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.sole.ID.IsZero() {
		return workload.Identity{}, workload.ErrUnknown
	}
	return i.sole, ctx.Err()
}

func known[K comparable](m map[K]workload.Identity, k K, ctx context.Context) (workload.Identity, error) {
	who, ok := m[k]
	if !ok {
		return workload.Identity{}, workload.ErrUnknown
	}
	return who, ctx.Err()
}

// Policy decides for the Decider. A nil function permits.
type Policy struct {
	Connect  func(c authz.Connection) bool
	Request  func(c authz.Connection, r authz.Request) bool
	HTTPOnly func(c authz.Connection) bool
	Broken   bool // every decision is an error
}

// Decider decides by a Policy that can be swapped, and records what it decided.
type Decider struct {
	tb     testing.TB
	policy atomic.Pointer[Policy]
	quiet  bool

	mu  sync.Mutex
	log []string
}

// NewDecider decides by p. It fails tb when a session is used by two
// goroutines at once, or asked about requests before its connection is permitted.
func NewDecider(tb testing.TB, p Policy) *Decider {
	d := &Decider{tb: tb}
	d.Set(p)
	return d
}

// Set swaps the policy.
func (d *Decider) Set(p Policy) { d.policy.Store(&p) }

// Quiet stops the recording, for benchmarks.
func (d *Decider) Quiet() { d.quiet = true }

// Log is what was decided, one line each, such as
// "egress connect a -> b: permit" or "ingress GET /x: deny".
func (d *Decider) Log() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.log...)
}

// Wait-free search of the log.
func (d *Decider) Logged(part string) bool {
	for _, line := range d.Log() {
		if strings.Contains(line, part) {
			return true
		}
	}
	return false
}

func (d *Decider) record(format string, args ...any) {
	if d.quiet {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, fmt.Sprintf(format, args...))
}

// Open implements proxy.Decider.
func (d *Decider) Open(c authz.Connection) (authz.Session, error) {
	if c.ID.IsZero() || c.Scope == "" || !c.Destination.Addr.IsValid() || !c.Source.Addr.IsValid() {
		d.tb.Errorf("incomplete connection put to policy: %+v", c)
	}
	return &session{d: d, c: c}, nil
}

type session struct {
	d         *Decider
	c         authz.Connection
	inUse     atomic.Bool
	permitted bool
	seq       uint32
}

func (s *session) enter() func() {
	if !s.inUse.CompareAndSwap(false, true) {
		s.d.tb.Error("session used by two goroutines at once")
	}
	return func() { s.inUse.Store(false) }
}

func (s *session) decision(ok bool) authz.Decision {
	d := authz.Decision{ID: s.c.ID, Unauthenticated: s.c.Source.ID.IsZero()}
	d.ID.Seq = s.seq
	switch {
	case ok:
		d.Effect = authz.Permit
	case s.c.Mode == authz.Enforce:
		d.Effect = authz.Deny
	default:
		d.Effect = authz.WouldDeny
	}
	return d
}

var errBroken = errors.New("policy is broken")

func (s *session) Connect() (authz.Decision, error) {
	defer s.enter()()
	p := s.d.policy.Load()
	if p.Broken {
		return authz.Decision{}, errBroken
	}
	d := s.decision(p.Connect == nil || p.Connect(s.c))
	s.permitted = d.Allowed()
	s.d.record("%v connect %s -> %s mesh=%v: %v", s.c.Side, s.c.Source.ID, s.c.Destination.ID, s.c.Mesh, d.Effect)
	return d, nil
}

func (s *session) Request(r *authz.Request) (authz.Decision, error) {
	defer s.enter()()
	if !s.permitted {
		s.d.tb.Error("request decided on a connection that is not permitted")
	}
	p := s.d.policy.Load()
	if p.Broken {
		return authz.Decision{}, errBroken
	}
	s.seq++
	d := s.decision(p.Request == nil || p.Request(s.c, *r))
	s.d.record("%v %s %s: %v", s.c.Side, r.Method, r.Target, d.Effect)
	return d, nil
}

func (s *session) HTTPOnly() bool {
	p := s.d.policy.Load()
	return p.HTTPOnly != nil && p.HTTPOnly(s.c)
}

func (s *session) Refuse(reason string) authz.Decision {
	defer s.enter()()
	d := s.decision(false)
	s.d.record("%v refuse: %s: %v", s.c.Side, reason, d.Effect)
	return d
}
