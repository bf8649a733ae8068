package agent

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sync/errgroup"

	"ringfence.dev/agent/capture"
	"ringfence.dev/policy/authz"
)

// Run starts the agent and blocks until ctx ends and all it started is gone.
// Live connections get the drain timeout to finish. What is pinned in the kernel
// stays if a scope enforces, so that stopping the agent does not open it;
// Cleanup removes it. A start that fails leaves the kernel as it found it.
func (a *Agent) Run(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("the agent needs root: it enters network namespaces and attaches to the kernel (try sudo)")
	}
	// From here on a reload is a reload: without a handler SIGHUP would end the process.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)

	runtime.GOMAXPROCS(a.settings.Threads)
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	a.life = life

	var closers stack
	defer closers.close(a.log)
	ends, err := a.openAll(ctx, &closers)
	if err != nil {
		return err
	}
	// The services live until the relay has drained: they follow life, not ctx.
	g, gctx := errgroup.WithContext(life)
	a.serve(gctx, g, ends, hup)
	if err := a.protect(ctx, gctx, g); err != nil {
		end()
		err = errors.Join(err, g.Wait())
		a.releaseCapture()
		a.closeScopes()
		return err
	}
	a.announce()
	select {
	case <-ctx.Done():
	case <-gctx.Done():
	}
	notifySystemd("STOPPING=1")
	a.running.Store(false)
	a.drain()
	end()
	failed := g.Wait()
	if errors.Is(failed, context.Canceled) {
		failed = nil
	}
	a.keep = a.enforces()
	a.releaseCapture()
	a.closeScopes()
	return failed
}

// releaseCapture closes the back end while it can still enter the scopes'
// namespaces: scopes that open without an agent open now, and not when the next one comes.
func (a *Agent) releaseCapture() {
	if err := a.closeBackend(); err != nil {
		a.log.Error("close", "what", "capture", "err", err)
	}
}

// enforces reports whether a live scope enforces.
func (a *Agent) enforces() bool {
	a.changing.Lock()
	defer a.changing.Unlock()
	return slices.ContainsFunc(a.scopeList(), func(sc *scope) bool { return sc.settings.Mode == authz.Enforce })
}

// openAll takes what only one agent can have, first of all the lock: a second
// one must end before it has touched what the first has in the kernel.
func (a *Agent) openAll(ctx context.Context, closers *stack) ([]endpoint, error) {
	lock, err := lockInstance(a.settings.Instance)
	if err != nil {
		return nil, err
	}
	closers.push("lock", lock.Close)
	if err := leafEmpty(ctx, leafName(a.settings.Instance)); err != nil {
		return nil, err
	}
	// Before any socket is made: a socket is of the cgroup that it was made in.
	if err := a.joinLeaf(closers); err != nil {
		return nil, err
	}
	ends, err := a.openEndpoints(closers)
	if err != nil {
		return nil, err
	}
	return ends, a.open(ctx, closers)
}

// serve starts everything but capture.
func (a *Agent) serve(ctx context.Context, g *errgroup.Group, ends []endpoint, hup <-chan os.Signal) {
	for _, e := range ends {
		g.Go(func() error { return a.serveEndpoint(ctx, e) })
	}
	g.Go(func() error { return a.authority.Run(ctx) })
	g.Go(func() error { return a.svids.Run(ctx) })
	g.Go(func() error { return a.decisions.Run(ctx) })
	g.Go(func() error { return a.policies.Follow(ctx) })
	g.Go(func() error { return a.followPolicy(ctx) })
	g.Go(func() error { return a.followSignals(ctx, hup) })
}

// protect makes the scopes live, then lets the back end run, then takes away
// what a previous agent left and nobody wants any more. The order keeps what a
// predecessor protected covered throughout.
func (a *Agent) protect(ctx, gctx context.Context, g *errgroup.Group) error {
	whole, err := a.addConfiguredScopes(ctx)
	if err != nil {
		return err
	}
	g.Go(func() error {
		return a.backend.Run(gctx, func(e capture.Event) { a.event(gctx, e) })
	})
	if b, ok := a.backend.(interface{ Prune() error }); ok && whole {
		if err := b.Prune(); err != nil {
			a.log.Error("remove what a previous agent left", "err", err)
		}
	}
	for _, sc := range a.scopeList() {
		a.noteUncovered(ctx, sc)
	}
	return nil
}

func (a *Agent) announce() {
	a.running.Store(true)
	a.log.Info("agent is ready", "instance", a.settings.Instance, "host", a.settings.Host,
		"trust_domain", a.settings.TrustDomain.Name(), "capture", a.backend.Name(), "why", a.backendReason,
		"threads", a.settings.Threads, "scopes", len(a.scopeList()))
	notifySystemd("READY=1")
}

// addConfiguredScopes adds those of the settings, all of them or none, and those
// of the last run as far as they can be had. whole is false when one could not.
func (a *Agent) addConfiguredScopes(ctx context.Context) (whole bool, err error) {
	saved, err := a.savedScopes()
	if err != nil {
		return false, err
	}
	for _, s := range a.settings.Scopes {
		if a.settings.DefaultScopes && anyHost(saved) {
			break // what was made of the default scope at run time is in its place
		}
		if err := a.addScope(ctx, s); err != nil {
			return false, err
		}
	}
	return a.restoreScopes(ctx, saved)
}

// drain takes nothing new and lets live connections finish, for as long as the settings say.
func (a *Agent) drain() {
	ctx, cancel := context.WithTimeout(context.Background(), a.settings.DrainTimeout)
	defer cancel()
	a.stopListening()
	a.log.Info("stopping", "drain_timeout", a.settings.DrainTimeout)
	a.relay.Drain(ctx)
}

// stopListening leaves new connections to what the kernel does with them while
// no agent is there, which is the same as after the drain.
func (a *Agent) stopListening() {
	a.changing.Lock()
	defer a.changing.Unlock()
	for _, sc := range a.scopeList() {
		if sc.listeners != nil {
			sc.listeners.stop()
		}
	}
}

// closeScopes lets go of all scopes in this process, and reports whether one of
// them enforces. What the kernel does with their traffic from now on is decided
// when the back end is closed.
func (a *Agent) closeScopes() (enforced bool) {
	a.changing.Lock()
	defer a.changing.Unlock()
	for _, sc := range a.scopeList() {
		enforced = enforced || sc.settings.Mode == authz.Enforce
		a.silence(sc)
		a.mu.Lock()
		delete(a.scopes, sc.settings.Name)
		a.mu.Unlock()
		sc.close()
	}
	return enforced
}
