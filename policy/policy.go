// Package policy decides connections and HTTP requests by Cedar policies read
// from a directory. README.md tells how to write them.
//
// It answers questions put in the words of policy/authz and knows neither sockets nor
// processes: who asks was proved before, and who carries the answer out is not its concern.
//
// The invariants: one immutable snapshot decides a whole request; a set of
// policies is loaded as a whole or not at all; what cannot be decided is
// refused (a forbid that fails counts as having matched, a request that has no
// canonical form matches no permit); and every decision is recorded.
package policy

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

// Recorder keeps decisions; [decisionlog.Log] is one. Record must not block on
// a disk and must not keep r or its strings. Its error means that the record is lost.
type Recorder interface {
	Record(r *decisionlog.Record) error
}

// Config is what an engine is made of. The zero value has no policies and records nowhere.
type Config struct {
	// Dir holds the policies: *.cedar in Cedar's text form, *.json in its JSON
	// form. Empty, or a directory that does not exist when the engine is made, means no policy.
	Dir string
	// Log keeps the decisions; nil keeps none.
	Log Recorder
	// RefuseUnrecorded makes enforcing scopes refuse what could not be recorded.
	RefuseUnrecorded bool
	// Internal reports whether ip belongs to the estate: what does not is an
	// ExternalHost, and dialling it is the action egress. It is asked only about destinations
	// without an identity. Nil means private, shared, link-local and loopback addresses.
	Internal func(scope string, ip netip.Addr) bool
	// EncodedSeparators are the ids of Services whose paths may hold %2F and %5C,
	// as part of a segment, because the service does not take them for separators.
	EncodedSeparators []string
	// Logger hears of reloads and of what went wrong with them; nil is silent.
	Logger *slog.Logger
}

// Engine decides by the policies of a directory. Its methods are called from many goroutines.
type Engine struct {
	cfg        Config
	separators map[string]bool
	snap       atomic.Pointer[snapshot]
	counts     counters

	// mu held means that no other reload is under way.
	mu      sync.Mutex
	status  Status        // guarded by mu; the part about loading
	changed chan struct{} // guarded by mu; closed and replaced at each swap
	past    []*snapshot   // guarded by mu; the newest last, for explanations
}

// maxPast is how many replaced snapshots are kept for explaining decisions that they made.
const maxPast = 3

type counters struct {
	permits, denies, wouldDenies, failures, unrecorded atomic.Uint64
}

// Status is what an operator needs to know of an engine.
type Status struct {
	Dir      string    `json:"dir"`
	Version  string    `json:"version"`
	Policies int       `json:"policies"`
	DryRun   int       `json:"dry_run_policies"` // of Policies
	LoadedAt time.Time `json:"loaded_at"`
	// Reloads counts swaps to another version, ReloadFailures loads that were
	// refused. LastError is why the directory as it is now is not what decides; empty when it is.
	Reloads        uint64    `json:"reloads"`
	ReloadFailures uint64    `json:"reload_failures"`
	LastError      string    `json:"last_error,omitempty"`
	LastErrorAt    time.Time `json:"last_error_at,omitzero"`
	// Decisions made so far, by effect, whether recorded or not.
	Permits     uint64 `json:"permits"`
	Denies      uint64 `json:"denies"`
	WouldDenies uint64 `json:"would_denies"`
	// EvaluationFailures counts decisions in which a forbid could not be evaluated.
	EvaluationFailures uint64 `json:"evaluation_failures"`
	// Unrecorded counts decisions that the log did not take.
	Unrecorded uint64 `json:"unrecorded"`
}

// New loads the policies of cfg.Dir. It starts nothing; see [Engine.Follow].
// Policies that do not load are a [*ProblemsError].
func New(cfg Config) (*Engine, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Internal == nil {
		cfg.Internal = func(_ string, ip netip.Addr) bool { return internal(ip) }
	}
	e := &Engine{cfg: cfg, separators: make(map[string]bool), changed: make(chan struct{})}
	for _, id := range cfg.EncodedSeparators {
		e.separators[id] = true
	}
	s := newSnapshot(nil)
	if _, err := os.Stat(cfg.Dir); cfg.Dir != "" && errors.Is(err, fs.ErrNotExist) {
		cfg.Logger.Warn("policy directory does not exist: no policy is loaded", "dir", cfg.Dir)
	} else if cfg.Dir != "" {
		if s, err = load(cfg.Dir); err != nil {
			return nil, err
		}
	}
	e.status = Status{Dir: cfg.Dir, LoadedAt: time.Now()}
	e.snap.Store(s)
	return e, nil
}

var sharedAddresses = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

func internal(ip netip.Addr) bool {
	return ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() || sharedAddresses.Contains(ip)
}

// Reload reads the directory anew and swaps to what it holds, if that is
// another version. On error the last good policies stay, and the error says why.
func (e *Engine) Reload() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cfg.Dir == "" || e.awaitingLocked() {
		return nil
	}
	s, err := load(e.cfg.Dir)
	if err != nil {
		e.status.ReloadFailures++
		e.status.LastError, e.status.LastErrorAt = err.Error(), time.Now()
		e.cfg.Logger.Error("policies not loaded, the last good ones stay", "dir", e.cfg.Dir,
			"version", e.snap.Load().version, "error", err)
		return err
	}
	e.status.LastError, e.status.LastErrorAt = "", time.Time{}
	old := e.snap.Load()
	if s.version == old.version {
		return nil
	}
	e.swapLocked(old, s)
	e.cfg.Logger.Info("policies loaded", "dir", e.cfg.Dir, "version", s.version, "policies", len(s.rules))
	return nil
}

// awaitingLocked reports whether the directory has not come into being yet: that is no
// failure, as losing it is.
func (e *Engine) awaitingLocked() bool {
	_, err := os.Stat(e.cfg.Dir)
	return errors.Is(err, fs.ErrNotExist) && e.status.Reloads == 0 && len(e.snap.Load().rules) == 0
}

func (e *Engine) swapLocked(old, s *snapshot) {
	e.past = append(e.past, old)
	if len(e.past) > maxPast {
		e.past = append([]*snapshot(nil), e.past[1:]...)
	}
	e.status.Reloads++
	e.status.LoadedAt = time.Now()
	e.snap.Store(s)
	close(e.changed)
	e.changed = make(chan struct{})
}

// Changed returns a channel that is closed at the next swap to other policies:
// the moment to ask live sessions again.
func (e *Engine) Changed() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.changed
}

// Version returns the version of the policies that decide now: 32 hex digits,
// a hash of their ids and meaning.
func (e *Engine) Version() string { return e.snap.Load().version }

// Status returns a copy of the engine's state and counters.
func (e *Engine) Status() Status {
	e.mu.Lock()
	st := e.status
	s := e.snap.Load()
	e.mu.Unlock()
	st.Version, st.Policies, st.DryRun = s.version, len(s.rules), len(s.rules)-s.decided
	st.Permits, st.Denies = e.counts.permits.Load(), e.counts.denies.Load()
	st.WouldDenies = e.counts.wouldDenies.Load()
	st.EvaluationFailures, st.Unrecorded = e.counts.failures.Load(), e.counts.unrecorded.Load()
	return st
}

// Open starts deciding one connection. Nothing is decided or recorded yet. It
// returns an error for a connection without a destination.
func (e *Engine) Open(c authz.Connection) (authz.Session, error) {
	if !c.Destination.Addr.IsValid() || !c.Source.Addr.Addr().IsValid() {
		return nil, errors.New("policy: connection without addresses")
	}
	s := &session{engine: e, conn: c, key: keyFor(&c, e.external(&c))}
	s.pair = e.snap.Load().pair(s.key)
	s.separators = e.separators[string(s.pair.resource.entity.UID.ID)]
	return s, nil
}

// external reports whether a connection leaves the estate.
func (e *Engine) external(c *authz.Connection) bool {
	return c.Destination.ID.IsZero() && c.Side == authz.Egress && !c.Mesh &&
		!e.cfg.Internal(c.Scope, plain(c.Destination.Addr.Addr()))
}
