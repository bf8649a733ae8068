package agent

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/capture"
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

// observed is the table of who talks to whom.
type observed struct {
	mu        sync.Mutex
	pairs     map[observationKey]*admin.Observation
	forgotten uint64
}

func newObserved() *observed { return &observed{pairs: map[observationKey]*admin.Observation{}} }

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
	p := o.pairs[key]
	if p == nil {
		if len(o.pairs) >= maxObserved {
			o.forgetOldestLocked()
		}
		p = &admin.Observation{Scope: f.Scope, Direction: f.Direction.String(), Workload: who.Name,
			Unit: who.Unit, Exe: who.Exe, Peer: peer.String(), First: at, Note: note}
		if f.Direction == flow.Inbound {
			p.Peer = peer.Addr().String()
		}
		if !who.ID.IsZero() {
			p.ID = who.ID.String()
		}
		o.pairs[key] = p
	}
	p.Count++
	p.Last = at
}

func (o *observed) forgetOldestLocked() {
	var oldest observationKey
	var at time.Time
	for k, p := range o.pairs {
		if at.IsZero() || p.Last.Before(at) {
			oldest, at = k, p.Last
		}
	}
	delete(o.pairs, oldest)
	o.forgotten++
}

// forgetScope drops what was seen in a scope that was removed.
func (o *observed) forgetScope(scope string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for k := range o.pairs {
		if k.scope == scope {
			delete(o.pairs, k)
		}
	}
}

// list is sorted by scope, workload, and how often a pair was seen.
func (o *observed) list() ([]admin.Observation, uint64) {
	o.mu.Lock()
	all := make([]admin.Observation, 0, len(o.pairs))
	for _, p := range o.pairs {
		all = append(all, *p)
	}
	forgotten := o.forgotten
	o.mu.Unlock()
	slices.SortFunc(all, func(a, b admin.Observation) int {
		return cmp.Or(cmp.Compare(a.Scope, b.Scope), cmp.Compare(a.Workload, b.Workload),
			cmp.Compare(b.Count, a.Count), cmp.Compare(a.Peer, b.Peer))
	})
	return all, forgotten
}

// event records what a capture back end saw in a scope that is only watched (or
// that it left alone in another). Who it was is read at once, while the process lives.
func (a *Agent) event(ctx context.Context, e capture.Event) {
	switch e.Kind {
	case capture.Connected, capture.Accepted, capture.Refused:
	default:
		return
	}
	who, err := a.watcher.Identify(ctx, e.Flow.Caller)
	if err != nil || who.Name == "" {
		who = workload.Identity{Name: e.Comm}
	}
	note := ""
	switch {
	case e.Kind == capture.Refused:
		note = "refused by the kernel hook"
	case e.Bypassing:
		note = "left alone"
	}
	a.observed.add(e.Flow, who, e.Time, note)
}
