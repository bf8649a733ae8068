package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/svid"
	"ringfence.dev/attest"
	"ringfence.dev/ca"
	"ringfence.dev/policy"
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
	closeBackend  func() error // once
	listenControl listenControl
	relay         *proxy.Relay
	observed      *observed
	owners        ownersSeen

	unlistened atomic.Uint64 // see listens
	refused    refusals

	running atomic.Bool // everything was started
	keep    bool        // what is in the kernel outlives this process; settled before the closers run

	// changing is held while a scope is added, removed or changed: one at a time.
	changing sync.Mutex
	// mu guards what is read by every connection; it is held for moments only.
	mu      sync.Mutex
	scopes  map[string]*scope
	missing map[string]string // scopes of the last run that were not restored, and why
	// problems by the part of the agent that has them; see setProblem.
	problems map[string]string
}

// New makes an agent from checked settings. Nothing is opened or started.
func New(s Settings, version string, log *slog.Logger) *Agent {
	return &Agent{
		settings: s, version: version, log: log, started: time.Now(),
		observed: newObserved(maxObserved), scopes: map[string]*scope{}, missing: map[string]string{},
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
// connections: those that are no longer permitted are closed, others go on. The
// certificate authority is read again too, so that an installed bundle or
// intermediate counts at once. What is broken stays as it was, the rest is loaded.
func (a *Agent) ReloadPolicy(context.Context) error {
	var errs []error
	if err := a.policies.Reload(); err != nil {
		errs = append(errs, fmt.Errorf("the policies in force stay as they were: %w", err))
	}
	if err := a.authority.Reload(); err != nil {
		errs = append(errs, fmt.Errorf("the certificate authority stays as it was: %w", err))
	}
	return errors.Join(errs...)
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
