package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca/keystore"
)

// Authority signs X.509-SVIDs with the intermediate of one state directory. Its
// methods may be called from many goroutines. It holds the intermediate's key in
// memory, never the root's.
type Authority struct {
	// Set by Open, then read-only.
	dir  *keystore.Dir
	opts Options
	td   spiffeid.TrustDomain

	state atomic.Pointer[state] // swapped whole, never changed

	// mu held means nobody else reloads or renews, so that the state read under
	// it is the newest.
	mu      sync.Mutex
	retryAt time.Time // no renewal is tried before; guarded by mu
}

// Open reads the state in dir. It returns [ErrNoCA] when dir was never set up or
// holds no intermediate, and [keystore.ErrUnsafe] when its files are open to
// others. An intermediate that has expired, or begins in the future, is opened
// all the same: Status tells, and Issue refuses.
func Open(dir string, opts Options) (*Authority, error) {
	opts, err := opts.check()
	if err != nil {
		return nil, err
	}
	d, err := openDir(dir, opts)
	if err != nil {
		return nil, err
	}
	a := &Authority{dir: d, opts: opts}
	s, err := a.read()
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	a.td = s.td
	a.state.Store(s)
	return a, nil
}

func (a *Authority) read() (*state, error) {
	s, err := load(a.dir)
	if err != nil {
		return nil, err
	}
	if s.intermediate.Key == nil {
		return nil, fmt.Errorf("%w: %s has no intermediate to sign with; run ringfence ca intermediate on the CA's host and ringfence ca install here", ErrNoCA, a.dir.Path())
	}
	return s, nil
}

// TrustDomain returns the trust domain whose SVIDs are signed.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.td }

// GetX509BundleForTrustDomain returns the trust bundle, which must not be
// changed, and so makes an Authority a source for go-spiffe. The same pointer is
// returned until the bundle changes. Another trust domain is [ErrForeign].
func (a *Authority) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != a.td {
		return nil, fmt.Errorf("%w: no trust bundle for %s", ErrForeign, td)
	}
	return a.state.Load().roots, nil
}

// Issue signs an X.509-SVID that binds id to pub for ttl (zero: [DefaultTTL], at
// most [MaxTTL]), cut short at the intermediate's own end. The chain is leaf
// first and without the root. The caller has made sure that the holder of the
// key is the workload; this only makes sure that the certificate is one.
//
// Errors match [ErrRefused], [ErrForeign], [ErrExpired] or [ErrClock], or come
// from the issuance log.
func (a *Authority) Issue(ctx context.Context, id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	chain, err := a.issue(ctx, id, pub, ttl)
	if err != nil {
		return nil, fmt.Errorf("issue SVID for %q: %w", id, err)
	}
	return chain, nil
}

func (a *Authority) issue(ctx context.Context, id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := a.checkRequest(id, pub, ttl); err != nil {
		return nil, err
	}
	now := time.Now()
	signer := a.signer(now)
	if err := checkIssuer(now, signer.Chain[0]); err != nil {
		return nil, err
	}
	leaf, err := signLeaf(id, pub, windowAt(now, lifetime(ttl), signer.Chain[0]), signer)
	if err != nil {
		return nil, err
	}
	if err := a.opts.Record(issuance("svid", id.String(), "", leaf, now)); err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{leaf}, signer.Chain...), nil
}

func (a *Authority) checkRequest(id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) error {
	switch {
	case id.IsZero():
		return fmt.Errorf("%w: no SPIFFE ID given", ErrRefused)
	case id.TrustDomain() != a.td:
		return fmt.Errorf("%w: %w: this CA signs for %s", ErrRefused, ErrForeign, a.td)
	case id.Path() == "":
		return fmt.Errorf("%w: a workload's SPIFFE ID has a path", ErrRefused)
	case len(id.String()) > maxID:
		return fmt.Errorf("%w: SPIFFE ID of more than %d octets", ErrRefused, maxID)
	case ttl < 0 || ttl > MaxTTL:
		return fmt.Errorf("%w: life of %v, must be at most %v", ErrRefused, ttl, MaxTTL)
	}
	return CheckKey(pub)
}

func lifetime(ttl time.Duration) time.Duration {
	if ttl == 0 {
		return DefaultTTL
	}
	return ttl
}

// checkIssuer refuses to sign outside the issuer's own period.
func checkIssuer(now time.Time, issuer *x509.Certificate) error {
	if err := checkClock(now, issuer); err != nil {
		return err
	}
	if !now.Before(issuer.NotAfter) {
		return fmt.Errorf("%w: it ended at %s; make a new one with: ringfence ca intermediate", ErrExpired, stamp(issuer.NotAfter))
	}
	return nil
}

// signLeaf signs and then holds the result to the profile as a peer would,
// before anybody gets to see it.
func signLeaf(id spiffeid.ID, pub crypto.PublicKey, w window, signer keystore.Pair) (*x509.Certificate, error) {
	ski, err := keyID(pub)
	if err != nil {
		return nil, err
	}
	leaf, err := sign(leafTemplate(id, ski, w), signer.Chain[0], pub, signer.Key)
	if err != nil {
		return nil, err
	}
	named, err := CheckLeaf(leaf)
	if err != nil {
		return nil, err
	}
	if named != id {
		return nil, broken("signed for %s where %s was asked", named, id)
	}
	return leaf, nil
}

// signer returns the intermediate, renewed first if it is due and the root is
// here. While the old one lasts, failing to renew it is no reason not to sign.
func (a *Authority) signer(now time.Time) keystore.Pair {
	s := a.state.Load()
	if now.Before(renewAt(s.intermediate.Chain[0])) {
		return s.intermediate
	}
	// Whoever finds a renewal under way signs with the old one meanwhile.
	if !a.mu.TryLock() {
		return s.intermediate
	}
	defer a.mu.Unlock()
	if err := a.renewDueLocked(now); err != nil && !errors.Is(err, ErrNoRoot) {
		a.opts.Log.Error("cannot renew the intermediate", "err", err, "not_after", s.intermediate.Chain[0].NotAfter)
	}
	return a.state.Load().intermediate
}

// Status is what there is to know about an authority's own certificates.
type Status struct {
	TrustDomain string    `json:"trust_domain"`
	Dir         string    `json:"dir"`
	RootHere    bool      `json:"root_here"` // whether the root key is in the directory
	Serial      string    `json:"serial"`    // of the intermediate, hexadecimal
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"` // end of the intermediate
	RenewAt     time.Time `json:"renew_at"`  // when a new intermediate is due
	Sequence    uint64    `json:"bundle_sequence"`
	Roots       []Root    `json:"roots"`
}

// Root is one root of the trust bundle.
type Root struct {
	Fingerprint string    `json:"sha256"`
	NotAfter    time.Time `json:"not_after"`
}

// Status reports the authority's certificates as they were last read.
func (a *Authority) Status() Status {
	s := a.state.Load()
	cert := s.intermediate.Chain[0]
	out := Status{
		TrustDomain: s.td.Name(), Dir: a.dir.Path(), RootHere: s.rootHere, Serial: cert.SerialNumber.Text(16),
		NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, RenewAt: renewAt(cert),
	}
	out.Sequence, _ = s.bundle.SequenceNumber()
	for _, root := range s.roots.X509Authorities() {
		out.Roots = append(out.Roots, Root{Fingerprint: Fingerprint(root), NotAfter: root.NotAfter})
	}
	return out
}
