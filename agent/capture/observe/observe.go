// Package observe is the capture back end that only looks: it samples the socket
// tables of its scopes and takes the kernel's word when a TCP socket ends. It
// redirects nothing, refuses nothing, and loads neither packet filter nor
// conntrack, so it serves watch mode on any kernel.
//
// What it sees is weaker than what a hook sees. A connection that begins and ends
// between two samples is told by the kernel's destroy event only, without its
// process, and not at all where those events are missing. Who called is found
// after the fact, through /proc.
package observe

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
)

// ErrWatchOnly reports a scope in another mode than watch.
var ErrWatchOnly = errors.New("observe: this back end cannot redirect; only watch mode works")

// interval between two samples. A sample of a thousand sockets costs a few
// milliseconds, so one second keeps it below one percent of a core.
const interval = time.Second

// queue bounds the events of a scope that ended sockets produce between two
// samples; at one second that is 4096 short connections a second. More are
// counted, not kept.
const queue = 4096

// Backend implements [capture.Backend] for watch mode.
type Backend struct {
	who *finder

	mu     sync.Mutex // held means that scopes does not change
	scopes map[string]*scope
	round  uint64 // of the scopes that take turns; guarded by mu
	closed bool
}

var _ capture.Backend = (*Backend)(nil)

// New opens the back end. It needs no privilege of its own, but without
// CAP_SYS_PTRACE other users' processes stay unnamed.
func New() *Backend {
	return &Backend{who: newFinder(), scopes: map[string]*scope{}}
}

// Name is "observe".
func (b *Backend) Name() string { return "observe" }

// Add begins to watch a scope. Any other mode than watch is [ErrWatchOnly].
func (b *Backend) Add(_ context.Context, s capture.Scope) error {
	if s.Mode != authz.Watch {
		return fmt.Errorf("scope %s in mode %v: %w", s.Name, s.Mode, ErrWatchOnly)
	}
	return b.Watch(s)
}

// Watch is Add for a back end that redirects by itself and has the scopes that
// it leaves alone watched from here, whatever the mode.
func (b *Backend) Watch(s capture.Scope) error { return b.watch(s, newScope) }

// WatchLoopback tells only of connections that never leave the namespace, and of the
// kernel's own, for scopes that are captured but for those. It costs little: the sockets
// of one such scope are looked at in each round, and no end of a socket is
// noticed, so that of n scopes each is sampled every n seconds, and what is shorter is
// missed. Sockets of the cgroup with the id except, and their peers, are left out.
func (b *Backend) WatchLoopback(s capture.Scope, except uint64) error {
	return b.watch(s, func(s capture.Scope) (*scope, error) { return newLoopbackScope(s, except) })
}

func (b *Backend) watch(s capture.Scope, open func(capture.Scope) (*scope, error)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return errors.New("observe: back end is closed")
	}
	if _, ok := b.scopes[s.Name]; ok {
		return fmt.Errorf("observe: scope %s is there already", s.Name)
	}
	sc, err := open(s)
	if err != nil {
		return fmt.Errorf("observe scope %s: %w", s.Name, err)
	}
	b.scopes[s.Name] = sc
	return nil
}

// SetMode accepts watch only.
func (b *Backend) SetMode(_ context.Context, s capture.Scope) error {
	if s.Mode != authz.Watch {
		return fmt.Errorf("scope %s in mode %v: %w", s.Name, s.Mode, ErrWatchOnly)
	}
	_, err := b.scope(s.Name)
	return err
}

// SetCgroups says what is covered; connections of the rest are marked as bypassing.
func (b *Backend) SetCgroups(name string, cgroups []capture.Cgroup) error {
	sc, err := b.scope(name)
	if err != nil {
		return err
	}
	sc.setCgroups(cgroups)
	return nil
}

// Remove ends watching a scope.
func (b *Backend) Remove(_ context.Context, name string) error {
	b.mu.Lock()
	sc := b.scopes[name]
	delete(b.scopes, name)
	b.mu.Unlock()
	if sc != nil {
		sc.close()
	}
	return nil
}

// Origin is always [capture.ErrNoOrigin]: nothing is redirected.
func (b *Backend) Origin(string, flow.Direction, int, netip.AddrPort, netip.AddrPort) (flow.Flow, error) {
	return flow.Flow{}, capture.ErrNoOrigin
}

// BeforeConnect does nothing: there is no capture to be exempt from.
func (b *Backend) BeforeConnect(string, int, netip.AddrPort, netip.AddrPort, flow.Flow) error {
	return nil
}

// Refused does nothing: no kernel hook could refuse.
func (b *Backend) Refused(string, flow.Flow, workload.Identity) {}

// PolicyChanged does nothing.
func (b *Backend) PolicyChanged() {}

// Run samples all scopes once a second until ctx ends, and calls event from one
// goroutine only.
func (b *Backend) Run(ctx context.Context, event func(capture.Event)) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		b.Sample(ctx, event)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Sample looks once at every scope, but at only one of those watched for
// loopback. What was there at a scope's first sample is told too: a connection
// that was open before is still one that is made use of.
func (b *Backend) Sample(ctx context.Context, event func(capture.Event)) {
	for _, sc := range b.due() {
		sc.sample(ctx, b.who, event)
	}
}

// due lists the scopes whose turn it is, in the order of their names.
func (b *Backend) due() (due []*scope) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var turns []*scope
	for _, name := range slices.Sorted(maps.Keys(b.scopes)) {
		if sc := b.scopes[name]; sc.onlyLoopback {
			turns = append(turns, sc)
		} else {
			due = append(due, sc)
		}
	}
	if len(turns) > 0 {
		b.round++
		due = append(due, turns[b.round%uint64(len(turns))])
	}
	return due
}

// Verify tells what watching misses; it names no uncovered traffic, because
// watching covers none.
func (b *Backend) Verify(name string) []string {
	sc, err := b.scope(name)
	if err != nil {
		return []string{err.Error()}
	}
	wrong := []string{"watched by sampling socket tables: nothing is redirected or refused"}
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if sc.destroyed == nil && !sc.onlyLoopback {
		wrong = append(wrong, "the kernel sends no events for ended sockets: connections shorter than a second may be missed")
	}
	if n := sc.lost.Load(); n > 0 {
		wrong = append(wrong, fmt.Sprintf("%d connections ended faster than they could be recorded", n))
	}
	if sc.err != nil {
		wrong = append(wrong, "latest sample failed: "+sc.err.Error())
	}
	return wrong
}

// Tables tells how many sockets are remembered per scope. There is no bound of
// ours: it is the namespace's own socket table.
func (b *Backend) Tables() []capture.Table {
	b.mu.Lock()
	defer b.mu.Unlock()
	var tables []capture.Table
	for name, sc := range b.scopes {
		sc.mu.Lock()
		tables = append(tables, capture.Table{Name: "observed_sockets/" + name, Entries: len(sc.seen)})
		sc.mu.Unlock()
	}
	return tables
}

// Close ends watching. Nothing was installed, so detach makes no difference.
func (b *Backend) Close(bool) error {
	b.mu.Lock()
	scopes := b.scopes
	b.scopes, b.closed = map[string]*scope{}, true
	b.mu.Unlock()
	for _, sc := range scopes {
		sc.close()
	}
	return nil
}

func (b *Backend) scope(name string) (*scope, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	sc, ok := b.scopes[name]
	if !ok {
		return nil, fmt.Errorf("scope %s: %w", name, capture.ErrNoScope)
	}
	return sc, nil
}
