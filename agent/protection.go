package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy/authz"
)

// How old a look at the kernel's state may be. Reading packet filter rules back
// costs tens of milliseconds a scope, and anybody on the host may ask for metrics.
const (
	verifiedForStatus  = time.Second
	verifiedForMetrics = 15 * time.Second
)

// verdict is the latest comparison of a scope with the kernel.
type verdict struct {
	mu       sync.Mutex // held while comparing: several askers share one look
	at       time.Time
	mode     authz.Mode
	problems []string
}

func (v *verdict) atMost(age time.Duration, mode authz.Mode, look func() []string) []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.at.IsZero() || v.mode != mode || time.Since(v.at) >= age {
		v.problems, v.mode, v.at = look(), mode, time.Now()
	}
	return slices.Clone(v.problems)
}

// protection is what is true of a scope's protection now.
type protection struct {
	whole     bool // it enforces and everything in it is captured
	problems  []string
	uncovered []admin.Uncovered
}

// protection reads the kernel back, unless that was done less than age ago.
// Whoever says that a scope is protected asks here.
func (a *Agent) protection(ctx context.Context, sc *scope, age time.Duration) protection {
	a.mu.Lock()
	name, mode := sc.settings.Name, sc.settings.Mode
	a.mu.Unlock()
	p := protection{problems: []string{}, uncovered: a.stillUncovered(ctx, sc)}
	if sc.cover != nil {
		if text := sc.cover.problem(); text != "" {
			p.problems = append(p.problems, text)
		}
	}
	if mode == authz.Watch {
		return p
	}
	p.problems = append(p.problems, sc.verified.atMost(age, mode, func() []string { return a.backend.Verify(name) })...)
	if !sc.addrs.state.Load().loUp {
		p.problems = append(p.problems, "the loopback interface is down, so nothing can be redirected: run `ip link set lo up` in the namespace")
	}
	p.whole = mode == authz.Enforce && len(p.problems) == 0 && len(p.uncovered) == 0
	return p
}
