package policy

import (
	"hash/maphash"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/eval"
)

// maxPairs bounds the caller and service pairs prepared per snapshot. Their
// number is a peer's choice (it may dial every port), so that the oldest do not matter:
// at the bound any one makes room. A pair takes about 2 KiB.
const maxPairs = 1024

// pair is one caller and one service under one snapshot: entities, the rules
// whose scopes cover both, and what follows without knowing a request. Read-only.
type pair struct {
	snap      *snapshot
	key       pairKey
	caller    string // the principal's SPIFFE ID, or "anonymous"
	principal *party
	resource  *party
	action    cedar.EntityUID // connect or egress
	src, mesh cedar.Value     // parts of every context
	rules     []*rule         // about services
	broad     []*rule         // about endpoints, without naming one
	httpOnly  bool
	connect   verdict
	hash      uint64 // tells pairs apart in the cache
}

// pair returns the prepared pair for a key, building it at first use.
func (s *snapshot) pair(key pairKey) *pair {
	s.mu.Lock()
	p := s.pairs[key]
	s.mu.Unlock()
	if p != nil {
		return p
	}
	p = s.newPair(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if built := s.pairs[key]; built != nil {
		return built // somebody was faster; one pair per key keeps the cache shared
	}
	if len(s.pairs) >= maxPairs {
		for other := range s.pairs {
			delete(s.pairs, other)
			break
		}
	}
	s.pairs[key] = p
	return p
}

func (s *snapshot) newPair(key pairKey) *pair {
	p := &pair{
		snap:      s,
		key:       key,
		principal: callerOf(key.source, key.sourceIP),
		src:       ipValue(key.sourceIP),
		mesh:      cedar.Boolean(key.mesh),
		hash:      maphash.Comparable(cacheSeed, key),
	}
	if p.caller = "anonymous"; !key.source.IsZero() {
		p.caller = key.source.String()
	}
	if key.external {
		p.resource, p.action = externalOf(key.addr), actionEgress
	} else {
		p.resource, p.action = serviceOf(key.destination, key.addr), actionConnect
		p.httpOnly = s.httpOnly(p.resource)
	}
	for _, r := range s.matching(p.principal, p.resource) {
		switch {
		case !r.aboutEndpoints:
			p.rules = append(p.rules, r)
		case r.endpoint == nil:
			p.broad = append(p.broad, r)
		}
	}
	p.connect = p.decideConnect()
	return p
}

// parties gives the evaluator the entities of a question. Ancestors have neither
// attributes nor, being flattened, parents: they need no entity.
type parties struct{ principal, resource *party }

func (e parties) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	if uid.Type == typeAction {
		action, ok := words.actions[uid]
		return action, ok
	}
	for _, p := range [...]*party{e.principal, e.resource} {
		if p != nil && p.entity.UID == uid {
			return p.entity, true
		}
	}
	return cedar.Entity{}, false
}

func (p *pair) connectContext() cedar.Record {
	return cedar.NewRecord(cedar.RecordMap{"src_ip": p.src, "mesh": p.mesh})
}

// httpOnly reports whether any deciding policy that names HTTP could apply to
// the service on any request of anybody. Conditions count as far as the service alone
// settles them: `when { resource.port == 80 }` speaks of no other port.
//
// A policy that leaves the action open does not count, because "anything may
// pass" says nothing about HTTP, nor does one in dry-run, because it must not
// change what passes.
func (s *snapshot) httpOnly(service *party) bool {
	found := false
	s.lookup(service, func(uid cedar.EntityUID) {
		for _, r := range s.http[uid] {
			found = found || r.mayConcern(service) &&
				(r.aboutEndpoints || couldApply(r, nil, service, nil, nil))
		}
	})
	return found
}

// couldApply reports whether a rule could match or fail on some HTTP request to the
// service: it does not when its conditions come out false whatever the unknown
// parts are. Nil stands for unknown.
func couldApply(r *rule, principal, service *party, src, mesh cedar.Value) bool {
	unknown := func(name cedar.String, v cedar.Value) cedar.Value {
		if v == nil {
			return eval.Variable(name)
		}
		return v
	}
	env := eval.Env{
		Entities:  parties{principal, service},
		Principal: eval.Variable("principal"),
		Action:    eval.Variable("action"),
		Resource:  service.entity.UID,
		Context: cedar.NewRecord(cedar.RecordMap{
			"src_ip":  unknown("src_ip", src),
			"mesh":    unknown("mesh", mesh),
			"request": eval.Variable("request"),
		}),
	}
	if principal != nil {
		env.Principal = principal.entity.UID
	}
	_, keep := eval.PartialPolicy(env, r.ast)
	return keep
}

// grants returns the deciding HTTP permits that could let some request of the
// caller pass: the reason to open a connection that no connect permit opens.
func (p *pair) grants() []string {
	var ids []string
	for _, r := range p.snap.matching(p.principal, p.resource) {
		if r.permit && !r.dryRun && r.http &&
			(r.aboutEndpoints || couldApply(r, p.principal, p.resource, p.src, p.mesh)) {
			ids = append(ids, r.id)
		}
	}
	return ids
}
