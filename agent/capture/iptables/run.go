package iptables

import (
	"context"
	"slices"
	"strings"
	"time"

	"ringfence.dev/agent/capture"
	"ringfence.dev/policy/authz"
)

const (
	// sampleEvery is how soon a port that an uncovered program opens is left alone.
	// Until then the agent is asked, and lets it pass.
	sampleEvery = time.Second
	// reconcileEvery is the pause between two scopes whose rules are read back. With
	// two hundred scopes each is looked at every ten minutes or so, and
	// it costs a few forks a minute; a single one every three seconds.
	reconcileEvery = 3 * time.Second
)

// Run looks at sockets where that is needed, repairs rules that somebody
// changed, and tells the guard that the agent lives. It returns
// when ctx ends and everything it started is gone. What it has begun to write it
// writes to the end: half a set of rules is worse than a stop that takes longer.
func (b *Backend) Run(ctx context.Context, event func(capture.Event)) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.beat(ctx)
	}()
	defer func() { <-done }()
	sample, reconcile := time.NewTicker(sampleEvery), time.NewTicker(reconcileEvery)
	defer sample.Stop()
	defer reconcile.Stop()
	b.sample(ctx, event)
	for next := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-sample.C:
			b.sample(ctx, event)
		case <-reconcile.C:
			next = b.reconcileOne(ctx, next)
		}
	}
}

// watching is what is looked for in a scope's socket tables.
type watching uint8

const (
	nothing    watching = iota
	loopback            // connections that never leave and are not captured
	everything          // in watch mode
)

// watchLocked has the scope watched as its mode and settings say. Who is captured is
// not: the agent learns more from the redirected connection, and a look at all
// sockets of a busy machine costs more than carrying their traffic.
func (sc *scope) watchLocked() error {
	want := nothing
	switch {
	case sc.s.Mode == authz.Watch:
		want = everything
	case sc.s.Loopback == capture.LoopbackObserve || sc.s.Loopback == "":
		want = loopback
	}
	if want == sc.watched {
		return nil
	}
	err := sc.b.watch.Remove(context.Background(), sc.name)
	sc.watched = nothing
	switch {
	case err == nil && want == everything:
		err = sc.b.watch.Watch(sc.s)
	case err == nil && want == loopback:
		err = sc.b.watch.WatchLoopback(sc.s, sc.b.leafID)
	}
	if err != nil {
		return err
	}
	sc.watched = want
	if want == nothing || !sc.s.Host {
		return nil
	}
	return sc.b.watch.SetCgroups(sc.name, sc.table)
}

// sample passes on what is seen, and keeps the rules in step with what listens.
func (b *Backend) sample(ctx context.Context, event func(capture.Event)) {
	b.watch.Sample(ctx, func(e capture.Event) {
		if e.Flow.Caller.CgroupID != b.leafID { // the agent itself
			event(e)
		}
	})
	for _, sc := range b.all() {
		sc.mu.Lock()
		if sc.followsPortsLocked() {
			if err := sc.followNewPortsLocked(context.WithoutCancel(ctx)); err != nil {
				b.log.Error("rules could not follow the scope's listeners", "scope", sc.name, "error", err)
			}
		}
		sc.mu.Unlock()
	}
}

// reconcileOne reads one scope's rules back, and writes them again when somebody
// has changed them: inside a container with CAP_NET_ADMIN anybody can.
func (b *Backend) reconcileOne(ctx context.Context, next int) int {
	scopes := b.all()
	if len(scopes) == 0 {
		return 0
	}
	if next >= len(scopes) {
		next = 0
	}
	sc := scopes[next]
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if sc.closed || sc.fw == nil || sc.s.Mode == authz.Watch {
		return next + 1
	}
	changed, err := sc.forwardsLocked(ctx)
	wrong := sc.fw.Verify(ctx, sc.want)
	if ctx.Err() != nil || err == nil && !changed && len(wrong) == 0 {
		return next + 1
	}
	if err == nil && len(wrong) > 0 {
		b.log.Warn("somebody changed the rules; writing them again", "scope", sc.name, "differences", wrong)
	}
	if err == nil {
		err = sc.writeLocked(context.WithoutCancel(ctx))
	}
	if err != nil {
		b.log.Error("rules could not be brought up to date", "scope", sc.name, "error", err)
	} else if len(wrong) > 0 {
		b.repairs.Add(1)
	}
	return next + 1
}

// Repairs is how often rules were found changed and written again.
func (b *Backend) Repairs() uint64 { return b.repairs.Load() }

func (b *Backend) beat(ctx context.Context) {
	if b.guard == nil {
		return
	}
	b.guard.run(ctx, func() { b.rearm(ctx) }, func(err error) {
		b.log.Error("no guard process: a dead or hung agent is not noticed until one is back", "error", err)
	})
}

// rearm writes all rules again after the guard has written its wills: the agent
// was stopped for longer than allowed, and lives again.
func (b *Backend) rearm(ctx context.Context) {
	b.log.Warn("the guard took the agent for dead, or was replaced; writing all rules again")
	for _, sc := range b.all() {
		sc.mu.Lock()
		if !sc.closed && sc.fw != nil {
			if err := sc.writeLocked(context.WithoutCancel(ctx)); err != nil {
				b.log.Error("rules could not be written again", "scope", sc.name, "error", err)
			}
		}
		sc.mu.Unlock()
	}
}

func (b *Backend) all() []*scope {
	b.mu.Lock()
	defer b.mu.Unlock()
	scopes := make([]*scope, 0, len(b.scopes))
	for _, sc := range b.scopes {
		scopes = append(scopes, sc)
	}
	slices.SortFunc(scopes, func(x, y *scope) int { return strings.Compare(x.name, y.name) })
	return scopes
}
