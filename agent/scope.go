package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"sync"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/capture/observe"
	"ringfence.dev/cni/netns"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy"
)

// scope is one live scope.
type scope struct {
	// Set by openScope, then read-only.
	ns      *netns.Handle
	addrs   *addresses
	network *network
	cover   *cover // of a host scope, else nil
	cancel  context.CancelFunc
	running sync.WaitGroup // what cancel ends

	// Guarded by Agent.mu; Agent.changing is held while they change.
	settings  ScopeSettings
	relay     *proxy.Scope // nil in watch mode
	listeners *listeners   // nil in watch mode
	uncovered []admin.Uncovered

	// Guarded by Agent.changing: the addresses that the back end was told of.
	source4, source6 netip.Addr

	verified verdict
}

// AddScope makes a scope live from its settings in JSON (the keys of the
// settings file). On error nothing of it is left behind.
func (a *Agent) AddScope(ctx context.Context, raw json.RawMessage) error {
	var c ScopeConfig
	if err := unmarshalStrict(raw, &c); err != nil {
		return admin.BadRequest{Err: err}
	}
	s, err := c.Check()
	if err != nil {
		return admin.BadRequest{Err: err}
	}
	a.changing.Lock()
	defer a.changing.Unlock()
	if err := a.addScopeLocked(ctx, s); err != nil {
		return mistake(err)
	}
	a.mu.Lock()
	sc := a.scopes[s.Name]
	delete(a.missing, s.Name)
	a.mu.Unlock()
	a.noteUncovered(ctx, sc)
	return a.rememberLocked()
}

// mistake marks errors that are the asker's to mend.
func mistake(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return admin.BadRequest{Err: err}
	case errors.Is(err, observe.ErrWatchOnly):
		return admin.BadRequest{Err: fmt.Errorf("%w: restart the agent with `capture: ebpf` or `capture: iptables` in its settings (`ringfence doctor` tells which works here)", err)}
	}
	return err
}

func (a *Agent) addScope(ctx context.Context, s ScopeSettings) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	return a.addScopeLocked(ctx, s)
}

func (a *Agent) addScopeLocked(ctx context.Context, s ScopeSettings) error {
	if err := a.scopeIsNew(s); err != nil {
		return err
	}
	sc, err := a.openScope(s)
	if err != nil {
		return fmt.Errorf("add scope %s: %w", s.Name, err)
	}
	if err := a.scopeIsDistinct(sc); err != nil {
		sc.close()
		return err
	}
	// Known before it is captured: a connection may arrive as soon as the back end has it.
	a.mu.Lock()
	a.scopes[s.Name] = sc
	a.mu.Unlock()
	if err := a.activate(ctx, sc); err != nil {
		a.dropScope(sc)
		return fmt.Errorf("add scope %s: %w", s.Name, err)
	}
	a.log.Info("scope added", "scope", s.Name, "mode", s.Mode, "namespace", sc.ns.Path())
	return nil
}

// dropScope forgets a scope that is no longer captured.
func (a *Agent) dropScope(sc *scope) {
	a.mu.Lock()
	delete(a.scopes, sc.settings.Name)
	a.mu.Unlock()
	a.attestor.Forget(sc.ns)
	a.watcher.Forget(sc.ns)
	sc.close()
}

func (a *Agent) scopeIsNew(s ScopeSettings) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.scopes[s.Name] != nil {
		return admin.BadRequest{Err: fmt.Errorf("scope %q exists: remove it first, or change its mode", s.Name)}
	}
	return nil
}

// scopeIsDistinct refuses a second scope of one namespace: its listeners could
// not be told apart.
func (a *Agent) scopeIsDistinct(sc *scope) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, other := range a.scopes {
		if other.ns.Same(sc.ns) {
			return admin.BadRequest{Err: fmt.Errorf("scope %q already covers that network namespace", name)}
		}
	}
	return nil
}

func (a *Agent) openScope(s ScopeSettings) (sc *scope, err error) {
	var ns *netns.Handle
	if s.Host {
		ns, err = netns.Self()
	} else {
		ns, err = netns.Open(s.Path)
	}
	if err != nil {
		return nil, err
	}
	addrs, err := newAddresses(ns)
	if err != nil {
		ns.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(a.life)
	sc = &scope{ns: ns, addrs: addrs, settings: s, cancel: cancel}
	sc.network = &network{scope: s.Name, ns: ns, addrs: addrs, backend: a.backend, mesh: a.settings.MeshNetworks, byUnit: identitiesByUnit(a.settings.Entries), refused: a.rememberRefusal, log: a.log}
	sc.running.Go(func() {
		if err := addrs.run(ctx, a.log, func() { a.addressesChanged(ctx, sc) }); err != nil {
			a.log.Error("addresses of a scope are no longer followed", "scope", s.Name, "err", err)
		}
	})
	if s.Host && a.leaf != 0 {
		if sc.cover, err = a.newCover(s); err != nil {
			sc.close()
			return nil, err
		}
		sc.running.Go(func() { sc.cover.run(ctx) })
	}
	return sc, nil
}

// target is the scope as the back end is told of it, in a mode.
func (sc *scope) target(m authz.Mode) capture.Scope {
	addrs := sc.addrs.state.Load()
	t := capture.Scope{
		Name: sc.settings.Name, NS: sc.ns, Mode: m, Host: sc.settings.Host,
		Loopback: sc.settings.Loopback, OnAgentDown: sc.settings.OnAgentDown,
		Source4: addrs.primary4, Source6: addrs.primary6,
	}
	if sc.listeners != nil {
		t.Outbound, t.Inbound = sc.listeners.outbound, sc.listeners.inbound
	}
	return t
}

// activate opens the listeners unless the scope is only watched, serves them,
// and turns capture on: in this order, so that nothing is led to a port where
// nobody listens.
func (a *Agent) activate(ctx context.Context, sc *scope) (err error) {
	defer func() {
		if err != nil {
			a.silence(sc)
		}
	}()
	if sc.settings.Mode != authz.Watch {
		if err := a.relayIn(sc); err != nil {
			return err
		}
	}
	target := sc.target(sc.settings.Mode)
	covering := sc.cover != nil && !sc.cover.all()
	if covering {
		if sc.settings.Mode != authz.Watch {
			if err := sc.cover.makeUnitRoots(); err != nil {
				return err
			}
		}
		if target.Cgroups, err = sc.cover.table(); err != nil {
			return err
		}
	}
	if err := a.backend.Add(ctx, target); err != nil {
		return err
	}
	sc.source4, sc.source6 = target.Source4, target.Source6
	if !covering {
		return nil
	}
	// Once more: what was made since is followed from here on.
	if err := sc.cover.refresh(); err != nil {
		return errors.Join(err, a.backend.Remove(ctx, sc.settings.Name))
	}
	return nil
}

// relayIn opens the listeners of a scope and serves them.
func (a *Agent) relayIn(sc *scope) error {
	l, err := openListeners(sc.ns, a.listenControl)
	if err != nil {
		return err
	}
	rs, err := a.relay.AddScope(proxy.ScopeConfig{
		Name: sc.settings.Name, Mode: sc.settings.Mode, Network: sc.network,
		Outbound: l.outbound, Inbound: l.inbound, Tunnel: l.tunnel,
	})
	if err != nil {
		l.close()
		return err
	}
	a.mu.Lock()
	sc.relay, sc.listeners = rs, l
	a.mu.Unlock()
	sc.running.Go(func() {
		if err := rs.Serve(a.life); err != nil && a.life.Err() == nil {
			a.log.Error("a scope's relay stopped", "scope", sc.settings.Name, "err", err)
		}
	})
	return nil
}

// silenceWithin bounds how long the connections of a scope that is taken down may finish.
const silenceWithin = 2 * time.Second

// silence stops relaying in a scope and closes its listeners.
func (a *Agent) silence(sc *scope) {
	a.mu.Lock()
	rs, l := sc.relay, sc.listeners
	sc.relay, sc.listeners = nil, nil
	a.mu.Unlock()
	if rs == nil {
		return
	}
	l.close()
	ctx, cancel := context.WithTimeout(context.Background(), min(a.settings.DrainTimeout, silenceWithin))
	defer cancel()
	rs.Drain(ctx)
}

// RemoveScope undoes AddScope: capture first, so that new connections go their
// own way, then the relay with what it still carries.
func (a *Agent) RemoveScope(ctx context.Context, name string) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	if was, err := a.forgetMissingLocked(name); was {
		return err
	}
	if err := a.removeScopeLocked(ctx, name); err != nil {
		return err
	}
	if a.configured(name) {
		a.log.Warn("scope removed, but it is in the settings file: the next start adds it again", "scope", name)
	}
	return a.rememberLocked()
}

// removeScopeLocked keeps a scope whose capture cannot be undone: its workloads
// would be led to listeners that are gone.
func (a *Agent) removeScopeLocked(ctx context.Context, name string) error {
	sc, err := a.scopeNamed(name)
	if err != nil {
		return err
	}
	if err := a.backend.Remove(ctx, name); err != nil {
		return fmt.Errorf("remove scope %s: %w", name, err)
	}
	a.silence(sc)
	a.dropScope(sc)
	a.observed.forgetScope(name)
	a.log.Info("scope removed", "scope", name)
	return nil
}

// SetMode changes a scope's mode. Between watch and the others the scope is
// taken down and put up again, because listeners come or go.
func (a *Agent) SetMode(ctx context.Context, name string, m authz.Mode) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	sc, err := a.scopeNamed(name)
	if err != nil {
		return err
	}
	old := sc.settings.Mode
	switch {
	case old == m:
		return nil
	case old == authz.Watch || m == authz.Watch:
		err = a.exchangeLocked(ctx, sc.settings, m)
	default:
		err = a.switchLocked(ctx, sc, m)
	}
	if err != nil {
		return mistake(fmt.Errorf("change mode of scope %s: %w", name, err))
	}
	a.log.Info("scope mode changed", "scope", name, "from", old, "to", m)
	if a.configured(name) {
		a.log.Warn("the settings file still has the other mode: it counts at the next start", "scope", name)
	}
	return a.rememberLocked()
}

// exchangeLocked takes a scope down and puts it up in another mode, or, where
// that fails, in the one it had: better the old mode than none.
func (a *Agent) exchangeLocked(ctx context.Context, s ScopeSettings, m authz.Mode) error {
	if err := a.removeScopeLocked(ctx, s.Name); err != nil {
		return err
	}
	next := s
	next.Mode = m
	if err := a.addScopeLocked(ctx, next); err != nil {
		return errors.Join(err, a.addScopeLocked(ctx, s))
	}
	if sc, err := a.scopeNamed(s.Name); err == nil {
		a.noteUncovered(ctx, sc)
	}
	return nil
}

// switchLocked changes between dry-run and enforce, which live connections survive.
func (a *Agent) switchLocked(ctx context.Context, sc *scope, m authz.Mode) error {
	if err := a.backend.SetMode(ctx, sc.target(m)); err != nil {
		return err
	}
	a.mu.Lock()
	sc.settings.Mode = m
	a.mu.Unlock()
	sc.relay.SetMode(m)
	return nil
}

func (sc *scope) close() {
	sc.cancel()
	sc.addrs.Close()
	sc.running.Wait()
	sc.ns.Close()
}

// addressesChanged tells the back end of a new primary address: it is what a
// captured workload sees as its own end of a connection.
func (a *Agent) addressesChanged(ctx context.Context, sc *scope) {
	// Never wait for the lock itself: who holds it may be waiting for us to end.
	for !a.changing.TryLock() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(settle):
		}
	}
	defer a.changing.Unlock()
	if live, err := a.scopeNamed(sc.settings.Name); err != nil || live != sc || ctx.Err() != nil {
		return // not yet, or no longer, captured
	}
	target := sc.target(sc.settings.Mode)
	if target.Source4 == sc.source4 && target.Source6 == sc.source6 {
		return
	}
	if err := a.backend.SetMode(ctx, target); err != nil {
		a.log.Error("tell capture of new addresses", "scope", sc.settings.Name, "err", err)
		return
	}
	sc.source4, sc.source6 = target.Source4, target.Source6
	a.log.Info("primary address changed", "scope", sc.settings.Name, "ipv4", target.Source4, "ipv6", target.Source6)
}

// scopeNamed returns a live scope.
func (a *Agent) scopeNamed(name string) (*scope, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	sc := a.scopes[name]
	if sc == nil {
		return nil, fmt.Errorf("scope %q: %w", name, admin.ErrNotFound)
	}
	return sc, nil
}

// scopeNS returns the namespace of a scope.
func (a *Agent) scopeNS(name string) (*netns.Handle, error) {
	sc, err := a.scopeNamed(name)
	if err != nil {
		return nil, err
	}
	return sc.ns, nil
}
