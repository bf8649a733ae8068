package ca

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca/keystore"
)

// Bundle returns the trust bundle kept in dir. The caller owns it.
func Bundle(dir string) (*spiffebundle.Bundle, error) {
	opts, err := Options{}.check()
	if err != nil {
		return nil, err
	}
	d, err := openDir(dir, opts)
	if err != nil {
		return nil, err
	}
	s, err := load(d)
	if err != nil {
		return nil, err
	}
	if s.bundle == nil {
		return nil, fmt.Errorf("%w: %s has no trust bundle", ErrNoCA, dir)
	}
	return s.bundle, nil
}

// InstallBundle adds the authorities in data, a SPIFFE bundle (JWKS) or PEM
// certificates, to the trust bundle in dir, and returns how many roots were new.
// It never takes one away, so that installing can be repeated and roots can be
// rotated with an overlap. On an empty directory the roots must name their trust
// domain, or opts must.
func InstallBundle(dir string, data []byte, opts Options) (added int, err error) {
	add, err := parseBundle(data)
	if err != nil {
		return 0, fmt.Errorf("install trust bundle: %w", err)
	}
	err = withDir(dir, opts, func(d *keystore.Dir, opts Options) error {
		td, err := trustDomainOf(d, add.X509Authorities(), opts.TrustDomain)
		if err != nil {
			return err
		}
		if err := checkRoots(add.X509Authorities(), td); err != nil {
			return err
		}
		if err := settleTrustDomain(d, td); err != nil {
			return err
		}
		added, err = mergeBundle(d, td, add)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("install trust bundle: %w", err)
	}
	return added, nil
}

// InstallIntermediate stores an intermediate that was made elsewhere, by
// [NewIntermediate] or another CA: PEM with one private key, its certificate,
// further certificates up to the root, and optionally roots. The roots found an
// empty directory's trust bundle; an existing bundle must hold the
// intermediate's root already, so that a file cannot extend whom this host
// trusts. It replaces an installed intermediate, and returns [ErrConflict]
// rather than touch a directory that has a root of its own.
func InstallIntermediate(dir string, data []byte, opts Options) error {
	p, err := keystore.DecodePair(data)
	if err != nil {
		return fmt.Errorf("install intermediate: %w: %w", ErrRefused, err)
	}
	chain, roots := splitRoots(p.Chain)
	if len(chain) == 0 || !chain[0].Equal(p.Chain[0]) {
		return fmt.Errorf("install intermediate: %w: the first certificate is a root; a root's key does not belong on a node", ErrRefused)
	}
	p.Chain = chain
	err = withDir(dir, opts, func(d *keystore.Dir, opts Options) error {
		return installIntermediate(d, p, roots, opts)
	})
	if err != nil {
		return fmt.Errorf("install intermediate: %w", err)
	}
	return nil
}

func installIntermediate(d *keystore.Dir, p keystore.Pair, roots []*x509.Certificate, opts Options) error {
	own, err := d.Has(rootFile)
	if err != nil {
		return err
	}
	if own {
		return fmt.Errorf("%w: %s holds a CA with its own root; move that directory away first if this host shall join another CA", ErrConflict, d.Path())
	}
	td, err := trustDomainOf(d, append(p.Chain[:1:1], roots...), opts.TrustDomain)
	if err != nil {
		return err
	}
	if err := checkIntermediate(p.Chain, td); err != nil {
		return err
	}
	if err := checkRoots(roots, td); len(roots) > 0 && err != nil {
		return err
	}
	bundle, found, err := bundleFor(d, td, p.Chain, roots)
	if err != nil {
		return err
	}
	if err := settleTrustDomain(d, td); err != nil {
		return err
	}
	if !found {
		if _, err := mergeBundle(d, td, bundle); err != nil {
			return err
		}
	}
	data, err := keystore.EncodePair(p)
	if err != nil {
		return err
	}
	return d.Write(intermediateFile, data)
}

// bundleFor returns the bundle that the chain is checked against: the one in the
// directory if there is one (found), else the roots in the file.
func bundleFor(d *keystore.Dir, td spiffeid.TrustDomain, chain, roots []*x509.Certificate) (b *spiffebundle.Bundle, found bool, err error) {
	b, err = loadBundle(d, td)
	if err != nil {
		return nil, false, err
	}
	found = b != nil
	if !found {
		b = spiffebundle.FromX509Authorities(td, roots)
	}
	if err := chainsTo(chain, b.X509Bundle()); err != nil {
		return nil, false, fmt.Errorf("%w; install the CA's trust bundle first (ringfence ca bundle install)", err)
	}
	return b, found, nil
}

// checkIntermediate holds every certificate of an installed chain to the rules
// of a CA, and the first to being usable for a while.
func checkIntermediate(chain []*x509.Certificate, td spiffeid.TrustDomain) error {
	for _, c := range chain {
		if err := CheckCA(c, td); err != nil {
			return err
		}
	}
	now := time.Now()
	if now.After(chain[0].NotAfter) {
		return fmt.Errorf("%w: it ended at %s; make a new one with: ringfence ca intermediate", ErrExpired, stamp(chain[0].NotAfter))
	}
	return checkClock(now, chain[0])
}

func checkRoots(roots []*x509.Certificate, td spiffeid.TrustDomain) error {
	if len(roots) == 0 {
		return fmt.Errorf("%w: no X.509 root in it", ErrRefused)
	}
	for _, c := range roots {
		if err := CheckCA(c, td); err != nil {
			return fmt.Errorf("root %s: %w", Fingerprint(c), err)
		}
	}
	return nil
}

// trustDomainOf settles whose certificates these are: what the directory says,
// else what was asked for, else what they name themselves.
func trustDomainOf(d *keystore.Dir, certs []*x509.Certificate, asked spiffeid.TrustDomain) (spiffeid.TrustDomain, error) {
	td, err := loadTrustDomain(d)
	if !errors.Is(err, ErrNoCA) {
		return td, err
	}
	if !asked.IsZero() {
		return asked, nil
	}
	for _, c := range certs {
		td, err := caTrustDomain(c)
		if err != nil || !td.IsZero() {
			return td, err
		}
	}
	return spiffeid.TrustDomain{}, fmt.Errorf("%w: the certificates do not name their trust domain; say it with --trust-domain", ErrRefused)
}

// splitRoots separates self-signed certificates, which belong into the bundle,
// from those that are sent to peers.
func splitRoots(certs []*x509.Certificate) (chain, roots []*x509.Certificate) {
	for _, c := range certs {
		if bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignatureFrom(c) == nil {
			roots = append(roots, c)
		} else {
			chain = append(chain, c)
		}
	}
	return chain, roots
}

// parseBundle reads JWKS or PEM. The trust domain is not known yet, and neither
// form carries one, so a stand-in is used until the roots have been looked at.
func parseBundle(data []byte) (*spiffebundle.Bundle, error) {
	standIn := spiffeid.RequireTrustDomainFromString("unknown.invalid")
	if text := bytes.TrimSpace(data); len(text) > 0 && text[0] == '{' {
		b, err := spiffebundle.Parse(standIn, text)
		if err != nil {
			return nil, fmt.Errorf("%w: %v", ErrRefused, err)
		}
		return b, nil
	}
	certs, err := keystore.DecodeCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%w: neither a SPIFFE bundle (JWKS) nor PEM certificates: %w", ErrRefused, err)
	}
	return spiffebundle.FromX509Authorities(standIn, certs), nil
}

// withDir runs f as the only writer of the directory.
func withDir(dir string, opts Options, f func(*keystore.Dir, Options) error) error {
	opts, err := opts.check()
	if err != nil {
		return err
	}
	d, err := keystore.MakeFS(dir, opts.fs)
	if err != nil {
		return err
	}
	unlock, err := d.Lock()
	if err != nil {
		return err
	}
	defer unlock()
	return f(d, opts)
}
