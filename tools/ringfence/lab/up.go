package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"
)

// permitAll is the policy of a lab that was given none.
const permitAll = `@id("permit-everything")
@reason("a lab without policies of its own permits everything")
permit (principal, action, resource);
`

// Up makes the lab and returns when its agents are ready. On a lab that is up
// with bare hosts, it gives them agents. When it fails, nothing is left behind
// that was not there before. It needs root.
func Up(ctx context.Context, o Options) (*Lab, error) {
	o, err := o.checked()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("the lab needs root: it makes network namespaces")
	}
	unlock, err := lock(o.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	switch l, err := Open(o.Name); {
	case errors.Is(err, ErrDown):
		return fresh(ctx, o)
	case err != nil:
		return nil, err
	case o.Capture == "off" || l.opts.Capture != "off":
		return nil, fmt.Errorf("%w (or was not brought down)", ErrUp)
	default:
		return l, l.protectOrUndo(ctx, o)
	}
}

// fresh makes a lab where there was none.
func fresh(ctx context.Context, o Options) (*Lab, error) {
	l := &Lab{opts: o, agents: map[string]*Agent{}}
	// Until the agents run, the hosts are bare.
	l.opts.Capture = "off"
	err := l.makeHosts(ctx)
	if err == nil && o.Capture != "off" {
		err = l.protectOrUndo(ctx, o)
	}
	if err != nil {
		return nil, errors.Join(err, l.down(context.WithoutCancel(ctx)))
	}
	return l, nil
}

// makeHosts makes the two hosts without agents.
func (l *Lab) makeHosts(ctx context.Context) error {
	if err := os.MkdirAll(l.path(), 0o700); err != nil {
		return fmt.Errorf("lab state: %w", err)
	}
	// Remembered before anything is made, so that Down knows what to look for.
	if err := l.save(); err != nil {
		return fmt.Errorf("lab state: %w", err)
	}
	return l.buildNetwork(ctx)
}

// Protect gives the hosts of a lab without agents an agent each, while what
// runs on them goes on. Name, as given to Up, stays.
func (l *Lab) Protect(ctx context.Context, o Options) error {
	o.Name = l.opts.Name
	o, err := o.checked()
	if err != nil {
		return err
	}
	if o.Capture == "off" {
		return errors.New("capture off means no agents: nothing to do")
	}
	unlock, err := lock(o.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if l.opts.Capture != "off" {
		return ErrUp
	}
	return l.protectOrUndo(ctx, o)
}

// protectOrUndo leaves bare hosts when the agents cannot be started.
func (l *Lab) protectOrUndo(ctx context.Context, o Options) error {
	err := l.protect(ctx, o)
	if err != nil {
		err = errors.Join(err, l.unprotect(context.WithoutCancel(ctx)))
	}
	return err
}

func (l *Lab) protect(ctx context.Context, o Options) error {
	l.opts = o
	// Remembered before anything is started, so that Down after a crash finds the agents.
	if err := errors.Join(l.save(), l.prepareAgents()); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, h := range o.Agents {
		g.Go(func() error {
			if err := l.agents[h].Start(gctx); err != nil {
				return fmt.Errorf("host %s: %w", h, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// prepareAgents writes everything the agents start from: policy, trust, settings.
func (l *Lab) prepareAgents() error {
	policies := l.opts.Policies
	if policies == "" {
		policies = l.path("policies")
		if err := os.MkdirAll(policies, 0o700); err != nil {
			return err
		}
		if err := writeFile(filepath.Join(policies, "permit-everything.cedar"), []byte(permitAll)); err != nil {
			return err
		}
	}
	for _, h := range l.opts.Agents {
		a, err := NewAgent(l.opts.Binary, l.path(h), l.agentConfig(h, policies))
		if err != nil {
			return fmt.Errorf("host %s: %w", h, err)
		}
		l.agents[h] = a
	}
	return l.distributeTrust()
}

func (l *Lab) agentConfig(host, policies string) AgentConfig {
	return AgentConfig{
		Instance: l.opts.Name + "-" + host, TrustDomain: l.opts.TrustDomain, Host: host,
		StateDir: l.path(host, "state"), Capture: l.opts.Capture, Policies: policies,
		UnitRoots: []string{l.UnitRoot(host)},
		Scopes:    []Scope{{Name: host, NetNS: l.NetNS(host), Mode: l.opts.Mode, Loopback: "enforce"}},
		Admin:     AdminSocket{l.Socket(host)},
		// Both agents share the machine's own network namespace, so fixed ports would clash.
		Metrics: Endpoint{"127.0.0.1:0"}, Readiness: Endpoint{"off"},
		DecisionLog:  LogFile{l.path(host, "decisions.jsonl")},
		DrainTimeout: drain,
	}
}

// Unprotect stops the agents and removes what they installed. The hosts and
// what runs on them stay.
func (l *Lab) Unprotect(ctx context.Context) error {
	unlock, err := lock(l.opts.Name)
	if err != nil {
		return err
	}
	defer unlock()
	return l.unprotect(ctx)
}

func (l *Lab) unprotect(ctx context.Context) error {
	var errs []error
	for _, h := range hosts {
		a, ok := l.Agent(h.name)
		if !ok {
			continue
		}
		errs = append(errs, a.Remove(ctx))
		delete(l.agents, h.name)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	l.opts.Capture = "off"
	return l.save()
}

// Agent returns the agent of a host; ok is false for a host without one.
func (l *Lab) Agent(host string) (a *Agent, ok bool) {
	if a, ok := l.agents[host]; ok {
		return a, true
	}
	if l.opts.Capture == "off" || !slices.Contains(l.opts.Agents, host) {
		return nil, false
	}
	return &Agent{Binary: l.opts.Binary, Dir: l.path(host), Socket: l.Socket(host)}, true
}

// Restart stops and starts the agent of a host. What is pinned in the kernel
// goes on capturing in between.
func (l *Lab) Restart(ctx context.Context, host string) error {
	if err := isHost(host); err != nil {
		return err
	}
	a, ok := l.Agent(host)
	if !ok {
		return fmt.Errorf("host %s has no agent", host)
	}
	unlock, err := lock(l.opts.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := a.Stop(ctx); err != nil {
		return err
	}
	return a.Start(ctx)
}
