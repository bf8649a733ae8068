package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/agent/svid"
	"ringfence.dev/attest"
	"ringfence.dev/ca"
	"ringfence.dev/policy"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/proxy"
	"ringfence.dev/proxy/h1"
)

// open makes the parts, leaves first. What it opened is on closers, also when it fails.
func (a *Agent) open(ctx context.Context, closers *stack) error {
	if err := a.openIdentity(closers); err != nil {
		return err
	}
	if err := a.openPolicy(closers); err != nil {
		return err
	}
	if err := a.openBackend(ctx, closers); err != nil {
		return err
	}
	return a.openRelay()
}

func (a *Agent) openRelay() (err error) {
	pins := map[netip.Addr]string{}
	for ip, id := range a.settings.Pins {
		pins[ip] = id.String()
	}
	a.relay, err = proxy.New(proxy.Config{
		Identifier: identifier{a}, Decider: coveringDecider{a.policies, a}, Credentials: a.svids,
		Pins: pins, HTTP: h1.Config{MaxHead: a.settings.MaxHeadBytes},
	})
	return err
}

// openIdentity opens the certificate authority, making one at first start, the
// store of SVIDs and the attestor.
func (a *Agent) openIdentity(closers *stack) error {
	if err := os.MkdirAll(a.settings.StateDir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	dir := filepath.Join(a.settings.StateDir, "ca")
	if err := a.adoptTrustDomain(dir); err != nil {
		return err
	}
	issued, err := ca.OpenLog(filepath.Join(a.settings.StateDir, ca.LogName))
	if err != nil {
		return fmt.Errorf("issuance log: %w", err)
	}
	closers.push("issuance log", issued.Close)
	opts := ca.Options{Log: a.log, Record: issued.Record}
	created, err := ca.Init(dir, a.settings.TrustDomain, opts)
	if err != nil {
		return fmt.Errorf("certificate authority in %s: %w", dir, err)
	}
	if created {
		a.log.Info("made a certificate authority for this host", "dir", dir, "trust_domain", a.settings.TrustDomain.Name())
	}
	if a.authority, err = ca.Open(dir, opts); err != nil {
		return fmt.Errorf("certificate authority in %s: %w", dir, err)
	}
	a.svids, err = svid.New(svid.Config{
		Issuer: a.authority, Bundles: a.authority, TTL: a.settings.SVIDTTL, Log: a.log,
		OnRenew: func(id spiffeid.ID) { a.relay.Retire(id) },
	})
	if err != nil {
		return err
	}
	entries := make([]attest.Entry, len(a.settings.Entries))
	for i, e := range a.settings.Entries {
		entries[i].ID = e.ID.String()
		for _, s := range e.Selectors {
			entries[i].Selectors = append(entries[i].Selectors, s.String())
		}
	}
	config := attest.Config{
		TrustDomain: a.settings.TrustDomain, Host: a.settings.Host,
		Entries: entries, UnitRoots: a.settings.UnitRoots,
		ExecID: a.execID, Listens: a.listens,
	}
	if a.attestor, err = attest.New(config); err != nil {
		return err
	}
	closers.push("attestor", a.attestor.Close)
	if pid, cgroup := a.attestor.Initial(); !pid || !cgroup {
		return errors.New("the agent runs in a pid or cgroup namespace of its own and cannot tell the host's processes apart: give its container the host's (hostPID, and cgroup namespace host)")
	}
	// What is only watched is named too where the name proves nothing; such names
	// carry a suffix, and nothing is decided by them.
	config.Executables = attest.ExecutablesAny
	if a.watcher, err = attest.New(config); err != nil {
		return err
	}
	closers.push("watching attestor", a.watcher.Close)
	return nil
}

var _ x509bundle.Source = (*ca.Authority)(nil)

// adoptTrustDomain takes the trust domain from an existing authority when the
// settings name none, so that installing an intermediate is all it takes to join.
func (a *Agent) adoptTrustDomain(dir string) error {
	if a.settings.TrustDomainGiven {
		return nil
	}
	authority, err := ca.Open(dir, ca.Options{})
	switch {
	case errors.Is(err, ca.ErrNoCA):
		return nil
	case err != nil:
		return fmt.Errorf("certificate authority in %s: %w", dir, err)
	}
	a.settings.TrustDomain = authority.TrustDomain()
	return nil
}

func (a *Agent) openPolicy(closers *stack) (err error) {
	if path := a.settings.DecisionLog; path != "" {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("decision log: %w", err)
		}
	}
	a.decisions, err = decisionlog.New(decisionlog.Config{Path: a.settings.DecisionLog, MaxSize: a.settings.DecisionLogMax})
	if err != nil {
		return fmt.Errorf("decision log: %w", err)
	}
	encoded := make([]string, len(a.settings.EncodedSlash))
	for i, id := range a.settings.EncodedSlash {
		encoded[i] = id.String()
	}
	a.policies, err = policy.New(policy.Config{
		Dir: a.settings.Policies, Log: a.decisions, RefuseUnrecorded: a.settings.RequireLog,
		Internal: a.internal, EncodedSeparators: encoded, Logger: a.log,
	})
	if err != nil {
		return fmt.Errorf("policies: %w", err)
	}
	return nil
}

// internal reports whether an address belongs to the estate: the scope's own
// networks and the mesh's, and what is not routed on the internet.
func (a *Agent) internal(scope string, ip netip.Addr) bool {
	if ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() || sharedSpace.Contains(ip) {
		return true
	}
	a.mu.Lock()
	sc := a.scopes[scope]
	a.mu.Unlock()
	return sc != nil && (sc.network.Local(ip) || sc.network.Mesh(ip))
}

// sharedSpace is the shared address space of RFC 6598.
var sharedSpace = netip.MustParsePrefix("100.64.0.0/10")

// followPolicy applies each new policy snapshot to what is already running.
func (a *Agent) followPolicy(ctx context.Context) error {
	for {
		changed := a.policies.Changed()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			a.backend.PolicyChanged()
			a.relay.Reevaluate()
		}
	}
}

var _ proxy.Decider = (*policy.Engine)(nil)
