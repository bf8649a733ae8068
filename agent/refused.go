package agent

import (
	"net/netip"
	"sync"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/proxy/flow"
)

// maxRefused bounds what is remembered of refusals: as many as the connect
// hook's own table holds.
const maxRefused = 8192

// refusals remembers what policy refused. The connect hook repeats a refusal by
// itself, and by the time we hear of it the process has often ended.
type refusals struct {
	mu   sync.Mutex
	seen map[refusalKey]refusal
}

type refusalKey struct {
	scope  string
	cgroup uint64
	uid    uint32
	to     netip.AddrPort
}

// refusal is a decision with the identity it was made for.
type refusal struct {
	who    workload.Identity
	record decisionlog.Record
}

func refusalOf(f flow.Flow) refusalKey {
	return refusalKey{f.Scope, f.Caller.CgroupID, f.Caller.UID, f.Destination}
}

func (r *refusals) add(f flow.Flow, seen refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil || len(r.seen) >= maxRefused {
		r.seen = map[refusalKey]refusal{} // some repetitions go unrecorded, nothing else is lost
	}
	r.seen[refusalOf(f)] = seen
}

func (r *refusals) find(f flow.Flow) (refusal, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen, ok := r.seen[refusalOf(f)]
	return seen, ok
}

// lookBack is how many of the newest records are searched for a refusal that
// was recorded just now.
const lookBack = 64

// rememberRefusal keeps the decision that the back end is about to push down.
func (a *Agent) rememberRefusal(f flow.Flow, who workload.Identity) {
	deny := authz.Deny
	for _, r := range a.decisions.Last(decisionlog.Filter{Scope: f.Scope, Effect: &deny}, lookBack) {
		if r.Destination == f.Destination && r.PID == f.Caller.PID {
			a.refused.add(f, refusal{who, r})
			return
		}
	}
}

// recordRefusal puts a refusal that the kernel made by itself into the decision
// log: the same decision, for one more attempt.
func (a *Agent) recordRefusal(e capture.Event, seen refusal) {
	r := seen.record
	r.ID, r.Time = authz.NewID(), e.Time
	r.PID, r.UID = e.Flow.Caller.PID, e.Flow.Caller.UID
	if e.Flow.Source.IsValid() {
		r.Source = e.Flow.Source
	} else { // the kernel had not chosen the port yet
		r.Source = netip.AddrPortFrom(r.Source.Addr(), 0)
	}
	if err := a.decisions.Record(&r); err != nil {
		a.log.Warn("a refusal by the connect hook was not recorded", "scope", e.Flow.Scope, "err", err)
	}
}
