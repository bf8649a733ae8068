package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"ringfence.dev/ca/keystore"
)

const (
	// reloadEvery is how often Run looks at the directory: an operator who
	// installs a bundle or an intermediate waits no longer than this.
	reloadEvery = time.Minute
	// renewHoldOff is the least time between two attempts to renew, so that a
	// full disk costs one failed write a minute and not one per SVID.
	renewHoldOff = time.Minute
)

// renewAt is when a third of the certificate's life is left: a month for the
// 90 days of an own intermediate, which is time enough to notice a failure.
func renewAt(cert *x509.Certificate) time.Time {
	return cert.NotAfter.Add(-cert.NotAfter.Sub(cert.NotBefore) / 3)
}

// Run keeps the authority current until ctx ends: once a minute it reads the
// directory again and renews the intermediate when that is due and the root is
// here. Without it the same happens, less promptly, inside Issue. Trouble is
// logged; the last good state stays in use. It returns nil.
func (a *Authority) Run(ctx context.Context) error {
	ticker := time.NewTicker(reloadEvery)
	defer ticker.Stop()
	for {
		a.tend()
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

func (a *Authority) tend() {
	if err := a.Reload(); err != nil {
		a.opts.Log.Error("cannot read the CA's state again; the last good one stays in use", "err", err)
		return
	}
	cert := a.state.Load().intermediate.Chain[0]
	if time.Now().Before(renewAt(cert)) {
		return
	}
	if err := a.Renew(); err != nil {
		a.opts.Log.Warn("the intermediate should be renewed", "err", err, "not_after", cert.NotAfter)
	}
}

// Reload reads the directory again, after a bundle or an intermediate was
// installed. On an error the last good state stays in use.
func (a *Authority) Reload() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.reloadLocked()
}

func (a *Authority) reloadLocked() error {
	s, err := a.read()
	if err != nil {
		return fmt.Errorf("reload CA: %w", err)
	}
	if s.td != a.td {
		return fmt.Errorf("reload CA: %w: the directory now belongs to %s", ErrConflict, s.td)
	}
	old := a.state.Load()
	if s.roots.Equal(old.roots) {
		s.roots = old.roots // callers compare pointers to see a change
	}
	a.state.Store(s)
	return nil
}

// Renew replaces the intermediate if it is due, by the root in the directory.
// The old one stays valid until its own end, so nothing needs to be told. It
// returns [ErrNoRoot] when the root's key is elsewhere.
func (a *Authority) Renew() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.renewDueLocked(time.Now())
}

func (a *Authority) renewDueLocked(now time.Time) error {
	if now.Before(a.retryAt) || now.Before(renewAt(a.state.Load().intermediate.Chain[0])) {
		return nil
	}
	a.retryAt = now.Add(renewHoldOff)
	if err := a.renewLocked(now); err != nil {
		return fmt.Errorf("renew intermediate: %w", err)
	}
	return nil
}

func (a *Authority) renewLocked(now time.Time) error {
	unlock, err := a.dir.Lock()
	if err != nil {
		return err
	}
	defer unlock()
	// Another process on this directory may have been faster.
	if err := a.reloadLocked(); err != nil {
		return err
	}
	s := a.state.Load()
	if now.Before(renewAt(s.intermediate.Chain[0])) {
		return nil
	}
	root, err := loadRoot(a.dir, s)
	if err != nil {
		return err
	}
	return a.replaceLocked(s, root, now)
}

func (a *Authority) replaceLocked(s *state, root keystore.Pair, now time.Time) error {
	old := s.intermediate.Chain[0]
	// A root near its own end cannot lend more time than it has.
	if !root.Chain[0].NotAfter.After(old.NotAfter) {
		return fmt.Errorf("%w: the root ends at %s and must be replaced", ErrExpired, stamp(root.Chain[0].NotAfter))
	}
	p, err := replaceIntermediate(a.dir, a.td, root, now, a.opts)
	if err != nil {
		// The write may have been stored although it reported a failure: what
		// the directory says is what counts, and either key is good.
		return errors.Join(err, a.reloadLocked())
	}
	next := *s
	next.intermediate = p
	a.state.Store(&next)
	a.opts.Log.Info("renewed the intermediate", "serial", p.Chain[0].SerialNumber.Text(16), "not_after", p.Chain[0].NotAfter)
	return nil
}
