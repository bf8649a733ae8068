package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/capture"
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
	problems  []string // found while adding
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
	if err := a.addScope(ctx, s); err != nil {
		return err
	}
	return a.rememberScopes()
}

func (a *Agent) addScope(ctx context.Context, s ScopeSettings) error {
	a.changing.Lock()
	defer a.changing.Unlock()
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
		a.mu.Lock()
		delete(a.scopes, s.Name)
		a.mu.Unlock()
		sc.close()
		return fmt.Errorf("add scope %s: %w", s.Name, err)
	}
	a.noteUncovered(ctx, sc)
	a.log.Info("scope added", "scope", s.Name, "mode", s.Mode, "namespace", sc.ns.Path(), "uncovered", len(sc.uncovered))
	return nil
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
	sc.network = &network{scope: s.Name, ns: ns, addrs: addrs, backend: a.backend, mesh: a.settings.MeshNetworks}
	sc.running.Go(func() {
		if err := addrs.run(ctx, func() { a.addressesChanged(sc) }); err != nil {
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

// activate opens the listeners unless the scope is only watched, serves them,
// and turns capture on: in this order, so that nothing is led to a port where
// nobody listens.
func (a *Agent) activate(ctx context.Context, sc *scope) error {
	target := capture.Scope{
		Name: sc.settings.Name, NS: sc.ns, Mode: sc.settings.Mode, Host: sc.settings.Host,
		Loopback: sc.settings.Loopback, OnAgentDown: sc.settings.OnAgentDown,
		Source4: sc.addrs.state.Load().primary4, Source6: sc.addrs.state.Load().primary6,
	}
	if sc.settings.Mode != authz.Watch {
		l, err := openListeners(sc.ns, a.listenControl)
		if err != nil {
			return err
		}
		target.Outbound, target.Inbound = l.outbound, l.inbound
		rs, err := a.relay.AddScope(proxy.ScopeConfig{
			Name: sc.settings.Name, Mode: sc.settings.Mode, Network: sc.network,
			Outbound: l.outbound, Inbound: l.inbound, Tunnel: l.tunnel,
		})
		if err != nil {
			l.close()
			return err
		}
		a.serve(sc, l, rs)
	}
	if err := a.backend.Add(ctx, target); err != nil {
		a.silence(sc)
		return err
	}
	if sc.cover == nil || sc.cover.all() {
		return nil
	}
	if err := sc.cover.refresh(); err != nil {
		a.silence(sc)
		return errors.Join(err, a.backend.Remove(ctx, sc.settings.Name))
	}
	return nil
}

func (a *Agent) serve(sc *scope, l *listeners, rs *proxy.Scope) {
	a.mu.Lock()
	sc.relay, sc.listeners = rs, l
	a.mu.Unlock()
	sc.running.Go(func() {
		if err := rs.Serve(a.life); err != nil && a.life.Err() == nil {
			a.log.Error("a scope's relay stopped", "scope", sc.settings.Name, "err", err)
		}
	})
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
	if err := a.removeScope(ctx, name); err != nil {
		return err
	}
	return a.rememberScopes()
}

func (a *Agent) removeScope(ctx context.Context, name string) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	a.mu.Lock()
	sc := a.scopes[name]
	a.mu.Unlock()
	if sc == nil {
		return fmt.Errorf("scope %q: %w", name, admin.ErrNotFound)
	}
	err := a.backend.Remove(ctx, name)
	a.silence(sc)
	a.mu.Lock()
	delete(a.scopes, name)
	a.mu.Unlock()
	a.attestor.Forget(sc.ns)
	sc.close()
	a.observed.forgetScope(name)
	a.log.Info("scope removed", "scope", name)
	return err
}

// SetMode changes a scope's mode. Between watch and the others the scope is
// taken down and put up again, because listeners come or go.
func (a *Agent) SetMode(ctx context.Context, name string, m authz.Mode) error {
	a.mu.Lock()
	sc := a.scopes[name]
	a.mu.Unlock()
	if sc == nil {
		return fmt.Errorf("scope %q: %w", name, admin.ErrNotFound)
	}
	old := sc.settings.Mode
	if old == m {
		return nil
	}
	if old == authz.Watch || m == authz.Watch {
		next := sc.settings
		next.Mode = m
		if err := a.removeScope(ctx, name); err != nil {
			return err
		}
		if err := a.addScope(ctx, next); err != nil {
			// Better the old mode than none.
			next.Mode = old
			return errors.Join(err, a.addScope(ctx, next))
		}
		return a.rememberScopes()
	}
	a.changing.Lock()
	defer a.changing.Unlock()
	target := capture.Scope{
		Name: name, NS: sc.ns, Mode: m, Host: sc.settings.Host,
		Loopback: sc.settings.Loopback, OnAgentDown: sc.settings.OnAgentDown,
		Source4: sc.addrs.state.Load().primary4, Source6: sc.addrs.state.Load().primary6,
	}
	if err := a.backend.SetMode(ctx, target); err != nil {
		return fmt.Errorf("change mode of scope %s: %w", name, err)
	}
	a.mu.Lock()
	sc.settings.Mode = m
	rs := sc.relay
	a.mu.Unlock()
	rs.SetMode(m)
	a.log.Info("scope mode changed", "scope", name, "from", old, "to", m)
	return a.rememberScopes()
}

func (sc *scope) close() {
	sc.cancel()
	sc.addrs.Close()
	sc.running.Wait()
	sc.ns.Close()
}

// addressesChanged tells the back end of a new primary address.
func (a *Agent) addressesChanged(sc *scope) {
	a.log.Debug("addresses changed", "scope", sc.settings.Name)
}

// scopeNS returns the namespace of a scope.
func (a *Agent) scopeNS(name string) (*netns.Handle, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	sc := a.scopes[name]
	if sc == nil {
		return nil, fmt.Errorf("scope %q: %w", name, admin.ErrNotFound)
	}
	return sc.ns, nil
}
