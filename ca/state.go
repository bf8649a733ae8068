package ca

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca/keystore"
)

// Names in the state directory.
const (
	stateFile        = "state.json"
	rootFile         = "root.pem"
	intermediateFile = "intermediate.pem"
	bundleFile       = "bundle.json"
)

// stateVersion is the layout of the directory. A program refuses a newer one
// rather than guess at it.
const stateVersion = 1

type header struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
}

// state is what one reading of the directory gave. It is never changed.
type state struct {
	td           spiffeid.TrustDomain
	bundle       *spiffebundle.Bundle // nil when there is none
	roots        *x509bundle.Bundle   // bundle's X.509 part; handed out, always the same pointer
	intermediate keystore.Pair        // zero when there is none
	rootHere     bool                 // whether root.pem exists
}

// load reads everything but the root key. It returns [ErrNoCA] for a directory
// that is missing or was never set up.
func load(d *keystore.Dir) (*state, error) {
	td, err := loadTrustDomain(d)
	if err != nil {
		return nil, err
	}
	s := &state{td: td}
	if s.rootHere, err = d.Has(rootFile); err != nil {
		return nil, err
	}
	if s.bundle, err = loadBundle(d, td); err != nil {
		return nil, err
	}
	if s.bundle != nil {
		s.roots = s.bundle.X509Bundle()
	}
	s.intermediate, err = loadIntermediate(d, s)
	return s, err
}

func loadTrustDomain(d *keystore.Dir) (spiffeid.TrustDomain, error) {
	data, err := d.Read(stateFile)
	if errors.Is(err, keystore.ErrNotExist) {
		return spiffeid.TrustDomain{}, fmt.Errorf("%w: %s is not set up; run: ringfence ca init, or ringfence ca install", ErrNoCA, d.Path())
	}
	if err != nil {
		return spiffeid.TrustDomain{}, err
	}
	var h header
	if err := json.Unmarshal(data, &h); err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("%w: %s: %v", ErrState, d.Join(stateFile), err)
	}
	if h.Version != stateVersion {
		return spiffeid.TrustDomain{}, fmt.Errorf("%w: %s has version %d and this program knows version %d; use the ringfence that wrote it",
			ErrState, d.Join(stateFile), h.Version, stateVersion)
	}
	td, err := spiffeid.TrustDomainFromString(h.TrustDomain)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("%w: %s: %v", ErrState, d.Join(stateFile), err)
	}
	return td, nil
}

// loadBundle returns nil without an error when no bundle is there yet.
func loadBundle(d *keystore.Dir, td spiffeid.TrustDomain) (*spiffebundle.Bundle, error) {
	data, err := d.Read(bundleFile)
	if errors.Is(err, keystore.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := spiffebundle.Parse(td, data)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %v", ErrState, d.Join(bundleFile), err)
	}
	for _, root := range b.X509Authorities() {
		if err := CheckCA(root, td); err != nil {
			return nil, fmt.Errorf("%s: root %s: %w", d.Join(bundleFile), Fingerprint(root), err)
		}
	}
	return b, nil
}

// loadPair reads a key with its certificates; the first must be a CA's of td.
func loadPair(d *keystore.Dir, name string, td spiffeid.TrustDomain) (keystore.Pair, error) {
	data, err := d.Read(name)
	if err != nil {
		return keystore.Pair{}, err
	}
	p, err := keystore.DecodePair(data)
	if err != nil {
		return keystore.Pair{}, fmt.Errorf("%w: %s: %w", ErrState, d.Join(name), err)
	}
	for _, c := range p.Chain {
		if err := CheckCA(c, td); err != nil {
			return keystore.Pair{}, fmt.Errorf("%s: %w", d.Join(name), err)
		}
	}
	return p, nil
}

// loadIntermediate returns a zero pair without an error when there is none. One
// that has expired is returned all the same: saying so is better than not
// starting, and the root may be here to renew it.
func loadIntermediate(d *keystore.Dir, s *state) (keystore.Pair, error) {
	p, err := loadPair(d, intermediateFile, s.td)
	if errors.Is(err, keystore.ErrNotExist) {
		return keystore.Pair{}, nil
	}
	if err != nil {
		return keystore.Pair{}, err
	}
	if err := chainsTo(p.Chain, s.roots); err != nil {
		return keystore.Pair{}, fmt.Errorf("%s: %w", d.Join(intermediateFile), err)
	}
	return p, nil
}

// chainsTo reports whether an intermediate leads to one of the roots. Time is
// left out of it: the moment looked at is the nearest one at which the
// intermediate itself is valid.
func chainsTo(chain []*x509.Certificate, roots *x509bundle.Bundle) error {
	if roots == nil || len(roots.X509Authorities()) == 0 {
		return fmt.Errorf("%w: there is no trust bundle to check the intermediate against", ErrConflict)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{
		Roots:         pool(roots.X509Authorities()),
		Intermediates: pool(chain[1:]),
		CurrentTime:   nearest(time.Now(), chain[0]),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return fmt.Errorf("%w: the intermediate leads to no root of the trust bundle: %w", ErrConflict, err)
	}
	return nil
}

func nearest(now time.Time, cert *x509.Certificate) time.Time {
	if now.Before(cert.NotBefore) {
		return cert.NotBefore
	}
	if now.After(cert.NotAfter) {
		return cert.NotAfter
	}
	return now
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

// settleTrustDomain writes the header at first use and holds later ones to it.
func settleTrustDomain(d *keystore.Dir, td spiffeid.TrustDomain) error {
	have, err := loadTrustDomain(d)
	if err == nil {
		if have != td {
			return fmt.Errorf("%w: %s belongs to trust domain %s, not %s; use another directory", ErrConflict, d.Path(), have, td)
		}
		return nil
	}
	if !errors.Is(err, ErrNoCA) {
		return err
	}
	data, err := json.Marshal(header{Version: stateVersion, TrustDomain: td.Name()})
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return d.Create(stateFile, append(data, '\n'))
}

// addRoots writes the bundle with the roots that it lacks and returns how many
// those were. The sequence number grows with every change.
func addRoots(d *keystore.Dir, td spiffeid.TrustDomain, roots []*x509.Certificate) (int, error) {
	add := spiffebundle.FromX509Authorities(td, roots)
	return mergeBundle(d, td, add)
}

func mergeBundle(d *keystore.Dir, td spiffeid.TrustDomain, add *spiffebundle.Bundle) (int, error) {
	old, err := loadBundle(d, td)
	if err != nil {
		return 0, err
	}
	fresh := old == nil
	if fresh {
		old = spiffebundle.New(td)
	}
	merged := old.Clone()
	for _, root := range add.X509Authorities() {
		merged.AddX509Authority(root)
	}
	for kid, key := range add.JWTAuthorities() {
		if merged.HasJWTAuthority(kid) {
			continue // replacing a key would take the old one away
		}
		if err := merged.AddJWTAuthority(kid, key); err != nil {
			return 0, fmt.Errorf("%w: %v", ErrProfile, err)
		}
	}
	if !fresh && merged.Equal(old) {
		return 0, nil
	}
	have, _ := old.SequenceNumber()
	theirs, _ := add.SequenceNumber()
	merged.SetSequenceNumber(max(have+1, theirs))
	merged.SetRefreshHint(refreshHint)
	added := len(merged.X509Authorities()) - len(old.X509Authorities())
	return added, writeBundle(d, merged)
}

// refreshHint is how often others should fetch our bundle, the default of the
// SPIFFE federation standard.
const refreshHint = 5 * time.Minute

func writeBundle(d *keystore.Dir, b *spiffebundle.Bundle) error {
	data, err := b.Marshal()
	if err != nil {
		return fmt.Errorf("encode trust bundle: %w", err)
	}
	return d.Write(bundleFile, append(data, '\n'))
}
