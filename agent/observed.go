package agent

import (
	"cmp"
	"container/list"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy/flow"
)

// maxObserved bounds the table of who talks to whom. A host with a thousand
// services that talk to ten others each stays within it; beyond, the pair that
// was silent for longest is forgotten, and counted.
const maxObserved = 10_000

type observationKey struct {
	scope string
	dir   flow.Direction
	name  string
	peer  netip.AddrPort
}

type observation struct {
	key observationKey
	admin.Observation
}

// observed is the table of who talks to whom. Peers choose what is in it (every
// scan is new pairs), so adding and forgetting take the same time however full it is.
type observed struct {
	mu        sync.Mutex // held means that pairs and order agree
	pairs     map[observationKey]*list.Element
	order     *list.List // of *observation, the one silent for longest in front
	forgotten uint64
	max       int
}

func newObserved(most int) *observed {
	return &observed{pairs: map[observationKey]*list.Element{}, order: list.New(), max: most}
}

// add records one sighting. For inbound traffic the peer's port says nothing and
// is left out, or every connection would be a pair of its own.
func (o *observed) add(f flow.Flow, who workload.Identity, at time.Time, note string) {
	peer := f.Destination
	if f.Direction == flow.Inbound {
		peer = netip.AddrPortFrom(f.Source.Addr(), 0)
	}
	key := observationKey{f.Scope, f.Direction, who.Name, peer}
	o.mu.Lock()
	defer o.mu.Unlock()
	e := o.pairs[key]
	if e == nil {
		if len(o.pairs) >= o.max {
			o.forgetLocked(o.order.Front())
			o.forgotten++
		}
		e = o.order.PushBack(newObservation(key, f, who, at))
		o.pairs[key] = e
	}
	o.order.MoveToBack(e)
	seen := e.Value.(*observation)
	seen.Count++
	seen.Last = at
	seen.Note = note
}

func newObservation(key observationKey, f flow.Flow, who workload.Identity, at time.Time) *observation {
	seen := &observation{key: key, Observation: admin.Observation{
		Scope: f.Scope, Direction: f.Direction.String(), Workload: who.Name,
		Unit: who.Unit, Exe: who.Exe, Peer: key.peer.String(), First: at,
	}}
	if f.Direction == flow.Inbound {
		seen.Peer = key.peer.Addr().String()
	}
	if !who.ID.IsZero() {
		seen.ID = who.ID.String()
	}
	return seen
}

func (o *observed) forgetLocked(e *list.Element) {
	delete(o.pairs, e.Value.(*observation).key)
	o.order.Remove(e)
}

// forgetScope drops what was seen in a scope that was removed.
func (o *observed) forgetScope(scope string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for e, next := o.order.Front(), (*list.Element)(nil); e != nil; e = next {
		next = e.Next()
		if e.Value.(*observation).key.scope == scope {
			o.forgetLocked(e)
		}
	}
}

// list is sorted by scope, workload, and how often a pair was seen.
func (o *observed) list() ([]admin.Observation, uint64) {
	o.mu.Lock()
	all := make([]admin.Observation, 0, len(o.pairs))
	for e := o.order.Front(); e != nil; e = e.Next() {
		all = append(all, e.Value.(*observation).Observation)
	}
	forgotten := o.forgotten
	o.mu.Unlock()
	slices.SortFunc(all, func(a, b admin.Observation) int {
		return cmp.Or(cmp.Compare(a.Scope, b.Scope), cmp.Compare(a.Workload, b.Workload),
			cmp.Compare(b.Count, a.Count), cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Direction, b.Direction))
	})
	return all, forgotten
}
