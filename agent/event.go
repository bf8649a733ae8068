package agent

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"time"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy/flow"
)

// event records what a capture back end saw in a scope that is only watched (or
// that it left alone in another). Who it was is read at once, while the process lives.
func (a *Agent) event(ctx context.Context, e capture.Event) {
	switch e.Kind {
	case capture.Connected, capture.Accepted, capture.Refused:
	default:
		return
	}
	if a.leaf != 0 && e.Flow.Caller.CgroupID == a.leaf {
		return // ourselves
	}
	note := ""
	switch {
	case e.Kind == capture.Refused:
		note = "refused by the kernel hook: " + e.Reason
	case e.Bypassing:
		note = "left alone: " + e.Reason
	}
	note = strings.TrimSuffix(note, ": ")
	if seen, ok := a.refused.find(e.Flow); ok && e.Kind == capture.Refused && e.ByPolicy {
		a.recordRefusal(e, seen)
		a.observed.add(e.Flow, seen.who, e.Time, note)
		return
	}
	a.observed.add(e.Flow, a.whoWas(ctx, e), e.Time, note)
}

// whoWas names the workload of an event for people. Nothing is decided by it.
func (a *Agent) whoWas(ctx context.Context, e capture.Event) workload.Identity {
	var who workload.Identity
	err := errNobody
	switch {
	case e.Flow.Caller.PID != 0:
		who, err = a.watcher.Identify(ctx, e.Flow.Caller)
	case e.Flow.Direction == flow.Inbound:
		who, err = a.ownerSeen(ctx, e.Flow.Scope, e.Flow.Destination)
	}
	if err == nil && who.Name != "" {
		return who
	}
	if e.Comm != "" && e.Flow.Caller.PID != 0 {
		return workload.Identity{Name: e.Comm}
	}
	return workload.Identity{Name: "unknown"}
}

var errNobody = errors.New("the event names no process")

// Inbound events come without the server's process, which is looked up by its
// port. A look asks the kernel, so that a flood of connections must not mean
// a flood of looks: an answer is good for ownerFresh, and there are at most
// maxOwnersSeen of them.
const (
	ownerFresh    = 2 * time.Second
	maxOwnersSeen = 4096
)

type ownerSeen struct {
	who workload.Identity
	err error
	at  time.Time
}

// ownersSeen remembers who was found behind a port.
type ownersSeen struct {
	mu sync.Mutex
	by map[seenPort]ownerSeen // guarded by mu
}

type seenPort struct {
	scope string
	at    netip.AddrPort
}

func (o *ownersSeen) get(k seenPort, now time.Time) (ownerSeen, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s, ok := o.by[k]
	return s, ok && now.Sub(s.at) < ownerFresh
}

func (o *ownersSeen) put(k seenPort, s ownerSeen) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.by == nil || len(o.by) >= maxOwnersSeen {
		o.by = map[seenPort]ownerSeen{}
	}
	o.by[k] = s
}

func (a *Agent) ownerSeen(ctx context.Context, scope string, at netip.AddrPort) (workload.Identity, error) {
	key, now := seenPort{scope, at}, time.Now()
	if s, ok := a.owners.get(key, now); ok {
		return s.who, s.err
	}
	s := ownerSeen{at: now}
	sc, err := a.scopeNamed(scope)
	if err == nil {
		s.who, err = a.watcher.Owner(ctx, sc.ns, at)
	}
	s.err = err
	a.owners.put(key, s)
	return s.who, s.err
}
