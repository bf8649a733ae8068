package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/svid"
	"ringfence.dev/attest"
	"ringfence.dev/ca"
	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/proxy"
)

// Agent is the node daemon. It is made by New and lives in Run.
type Agent struct {
	// Set by New, then read-only.
	settings Settings
	log      *slog.Logger
	version  string
	started  time.Time

	// Set while Run starts, then read-only.
	life          context.Context // ends with Run; what scopes run under
	leaf          uint64          // id of the agent's own cgroup; zero without cgroup v2
	leafPath      string          // its path below the cgroup v2 root
	authority     *ca.Authority
	svids         *svid.Store
	attestor      *attest.Attestor
	watcher       *attest.Attestor // names for what is only watched
	decisions     *decisionlog.Log
	policies      *policy.Engine
	backend       capture.Backend
	backendReason string
	listenControl listenControl
	relay         *proxy.Relay
	observed      *observed

	running  atomic.Bool // everything was started
	enforced bool        // a scope enforced when Run ended; set before the closers run

	// changing is held while a scope is added, removed or changed: one at a time.
	changing sync.Mutex
	// mu guards what is read by every connection; it is held for moments only.
	mu     sync.Mutex
	scopes map[string]*scope
}

// New makes an agent from checked settings. Nothing is opened or started.
func New(s Settings, version string, log *slog.Logger) *Agent {
	return &Agent{
		settings: s, version: version, log: log, started: time.Now(),
		observed: newObserved(), scopes: map[string]*scope{},
	}
}

// Run starts the agent and blocks until ctx ends and all it started is gone.
// Live connections get the drain timeout to finish. What is pinned in the kernel
// stays if a scope enforces, so that stopping the agent does not open it;
// Cleanup removes it.
func (a *Agent) Run(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("the agent needs root: it enters network namespaces and attaches to the kernel (try sudo)")
	}
	runtime.GOMAXPROCS(a.settings.Threads)
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	a.life = life

	var closers stack
	defer closers.close(a.log)
	if err := a.open(ctx, &closers); err != nil {
		return err
	}
	listener, err := admin.Listen(a.settings.AdminSocket)
	if err != nil {
		return err
	}

	// The services live until the relay has drained: they follow life, not ctx.
	g, gctx := errgroup.WithContext(life)
	g.Go(func() error { return serveHTTP(gctx, listener, admin.Handler(a)) })
	if err := a.serveEndpoints(gctx, g); err != nil {
		listener.Close()
		return err
	}
	g.Go(func() error { return a.authority.Run(gctx) })
	g.Go(func() error { return a.svids.Run(gctx) })
	g.Go(func() error { return a.decisions.Run(gctx) })
	g.Go(func() error { return a.policies.Follow(gctx) })
	g.Go(func() error { return a.followPolicy(gctx) })
	g.Go(func() error {
		return a.backend.Run(gctx, func(e capture.Event) { a.event(gctx, e) })
	})
	g.Go(func() error { return a.followSignals(gctx) })

	if err := a.addConfiguredScopes(ctx); err != nil {
		end()
		return errors.Join(err, g.Wait())
	}
	a.running.Store(true)
	a.log.Info("agent is ready", "instance", a.settings.Instance, "host", a.settings.Host,
		"trust_domain", a.settings.TrustDomain.Name(), "capture", a.backend.Name(), "why", a.backendReason,
		"threads", a.settings.Threads, "scopes", len(a.settings.Scopes))
	notifySystemd("READY=1")

	var failed error
	select {
	case <-ctx.Done():
	case <-gctx.Done():
	}
	notifySystemd("STOPPING=1")
	a.running.Store(false)
	a.drain()
	end()
	failed = g.Wait()
	if errors.Is(failed, context.Canceled) {
		failed = nil
	}
	a.closeScopes()
	return failed
}

func (a *Agent) addConfiguredScopes(ctx context.Context) error {
	for _, s := range a.settings.Scopes {
		if err := a.addScope(ctx, s); err != nil {
			return err
		}
	}
	return a.restoreScopes(ctx)
}

// drain lets live connections finish, for as long as the settings say.
func (a *Agent) drain() {
	ctx, cancel := context.WithTimeout(context.Background(), a.settings.DrainTimeout)
	defer cancel()
	a.log.Info("stopping", "drain_timeout", a.settings.DrainTimeout)
	a.relay.Drain(ctx)
}

// closeScopes lets go of all scopes in this process. What the kernel does with
// their traffic from now on was decided when the back end was closed.
func (a *Agent) closeScopes() {
	a.changing.Lock()
	defer a.changing.Unlock()
	for name, sc := range a.scopes {
		a.enforced = a.enforced || sc.settings.Mode == authz.Enforce
		a.silence(sc)
		sc.close()
		delete(a.scopes, name)
	}
}

// Ready returns nil once everything was started and the policies in force are sound.
func (a *Agent) Ready() error {
	if !a.running.Load() {
		return errors.New("starting or stopping")
	}
	return nil
}

// ReloadPolicy loads the policy directory anew and applies it to live
// connections: those that are no longer permitted are closed, others go on.
func (a *Agent) ReloadPolicy(context.Context) error {
	if err := a.policies.Reload(); err != nil {
		return fmt.Errorf("the policies in force stay as they were: %w", err)
	}
	return nil
}

// stack closes what was opened, in reverse order.
type stack struct{ fns []closer }

type closer struct {
	what string
	fn   func() error
}

func (s *stack) push(what string, fn func() error) { s.fns = append(s.fns, closer{what, fn}) }

func (s *stack) close(log *slog.Logger) {
	for i := len(s.fns) - 1; i >= 0; i-- {
		if err := s.fns[i].fn(); err != nil {
			log.Error("close", "what", s.fns[i].what, "err", err)
		}
	}
}
