package policy

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cedar-policy/cedar-go"
)

// snapshot is one immutable set of policies, indexed. Only its caches change,
// and they hold nothing that could not be computed again.
type snapshot struct {
	version string
	rules   []*rule // by id
	byID    map[string]*rule
	index   map[indexKey][]*rule
	// http holds the deciding rules that name HTTP, by what their resource scope names.
	http map[cedar.EntityUID][]*rule
	// Endpoints by service, and the rules that name each.
	routes        map[cedar.EntityUID]routes
	aboutEndpoint map[cedar.EntityUID][]*rule
	// decided is the number of rules that decide: all but those in dry-run.
	decided int

	mu    sync.Mutex
	pairs map[pairKey]*pair // guarded by mu
	cache [cacheSlots]atomic.Pointer[cached]
}

// indexKey is what the scopes of a policy name; a part that they leave open is
// zero. A policy whose key does not occur among the keys of a request (its principal
// and resource, their ancestors, and open) cannot match it, nor fail on it:
// leaving it out is exact for permit and forbid alike.
type indexKey struct{ principal, resource cedar.EntityUID }

func keyOf(r *rule) indexKey {
	var k indexKey
	k.principal, _ = scopeEntity(r.ast.Principal)
	k.resource, _ = scopeEntity(r.ast.Resource)
	if r.endpoint != nil {
		k.resource = cedar.NewEntityUID(typeService, cedar.String(r.endpoint.service))
	}
	return k
}

func newSnapshot(rules []*rule) *snapshot {
	slices.SortFunc(rules, func(a, b *rule) int { return cmp.Compare(a.id, b.id) })
	s := &snapshot{
		rules: rules,
		byID:  make(map[string]*rule, len(rules)),
		index: make(map[indexKey][]*rule, len(rules)),
		http:  make(map[cedar.EntityUID][]*rule),
		pairs: make(map[pairKey]*pair),

		routes:        make(map[cedar.EntityUID]routes),
		aboutEndpoint: make(map[cedar.EntityUID][]*rule),
	}
	h := sha256.New()
	for i, r := range rules {
		r.order = i
		s.byID[r.id] = r
		s.index[keyOf(r)] = append(s.index[keyOf(r)], r)
		if r.endpoint != nil {
			s.addEndpoint(r)
		}
		if !r.dryRun {
			s.decided++
			if r.http {
				s.http[keyOf(r).resource] = append(s.http[keyOf(r).resource], r)
			}
		}
		h.Write([]byte(r.id))
		h.Write([]byte{0})
		h.Write(r.canonical())
		h.Write([]byte{0})
	}
	s.version = hex.EncodeToString(h.Sum(nil)[:16])
	return s
}

// canonical is the policy without layout and comments, so that what means the
// same has the same version. In JSON and with its keys sorted, because the order of a record's
// attributes is lost where policies come from JSON.
func (r *rule) canonical() []byte {
	text, err := r.policy.MarshalJSON()
	if err != nil {
		return r.policy.MarshalCedar() // a value that JSON cannot hold; text can
	}
	var value any
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if dec.Decode(&value) == nil {
		if sorted, err := json.Marshal(value); err == nil {
			return sorted
		}
	}
	return text
}

func (s *snapshot) addEndpoint(r *rule) {
	e, service := r.endpoint, keyOf(r).resource
	if s.aboutEndpoint[e.uid] == nil {
		if s.routes[service] == nil {
			s.routes[service] = make(routes)
		}
		s.routes[service].add(e)
	}
	s.aboutEndpoint[e.uid] = append(s.aboutEndpoint[e.uid], r)
}

// matching returns the rules whose principal and resource scopes cover the two
// parties, by id. Rules about an endpoint are matched by its service.
func (s *snapshot) matching(principal, resource *party) []*rule {
	var found []*rule
	s.lookup(resource, func(r cedar.EntityUID) {
		s.lookup(principal, func(p cedar.EntityUID) {
			for _, rule := range s.index[indexKey{p, r}] {
				if covers(rule.ast.Principal, principal) && rule.mayConcern(resource) {
					found = append(found, rule)
				}
			}
		})
	})
	slices.SortFunc(found, func(a, b *rule) int { return cmp.Compare(a.order, b.order) })
	return found
}

// lookup calls do for each entity a scope might name to cover p, and for none.
func (s *snapshot) lookup(p *party, do func(cedar.EntityUID)) {
	do(cedar.EntityUID{})
	do(p.entity.UID)
	for _, uid := range p.above {
		do(uid)
	}
}

// mayConcern reports whether the rule's resource scope covers the resource or,
// for a service, an endpoint that it may have.
func (r *rule) mayConcern(resource *party) bool {
	if !r.aboutEndpoints {
		return covers(r.ast.Resource, resource)
	}
	if resource.entity.UID.Type != typeService {
		return false
	}
	uid, named := scopeEntity(r.ast.Resource)
	switch {
	case r.endpoint != nil:
		return string(resource.entity.UID.ID) == r.endpoint.service
	case named:
		return resource.in(uid)
	}
	return true
}
