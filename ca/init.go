package ca

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca/keystore"
)

// Init makes sure that dir holds what is needed to sign SVIDs of td, and reports
// whether it made a new root. It may be called at every start: what exists is
// left alone, and what an interrupted call left unfinished is finished. Of
// several processes at once, one makes the CA and the others find it.
//
// In a directory that holds an installed intermediate it does nothing. It
// returns [ErrConflict] when dir belongs to another trust domain or holds an
// installed trust bundle without an intermediate, and [ErrClock] when a root
// would be made under a clock that is plainly wrong.
func Init(dir string, td spiffeid.TrustDomain, opts Options) (created bool, err error) {
	opts, err = opts.check()
	if err != nil {
		return false, err
	}
	if td.IsZero() {
		return false, fmt.Errorf("%w: a CA needs a trust domain", ErrRefused)
	}
	d, err := keystore.MakeFS(dir, opts.fs)
	if err != nil {
		return false, fmt.Errorf("init CA: %w", err)
	}
	unlock, err := d.Lock()
	if err != nil {
		return false, fmt.Errorf("init CA: %w", err)
	}
	defer unlock()
	created, err = initLocked(d, td, opts)
	if err != nil {
		return false, fmt.Errorf("init CA: %w", err)
	}
	return created, nil
}

func initLocked(d *keystore.Dir, td spiffeid.TrustDomain, opts Options) (created bool, err error) {
	now := time.Now()
	if err := settleTrustDomain(d, td); err != nil {
		return false, err
	}
	installed, err := isInstalled(d)
	if err != nil || installed {
		return false, err
	}
	root, err := loadPair(d, rootFile, td)
	if errors.Is(err, keystore.ErrNotExist) {
		created = true
		if err := createRoot(d, td, now); err != nil {
			return false, err
		}
		// Go on with what the disk has, not with what it was told: an
		// intermediate under a root that was lost could never be renewed.
		root, err = loadPair(d, rootFile, td)
	}
	if err != nil {
		return false, err
	}
	// From here on every step is repeated until it holds: a crash between two
	// of them is finished by the next call.
	if _, err := addRoots(d, td, root.Chain[:1]); err != nil {
		return false, err
	}
	return created, ensureIntermediate(d, td, root, now, opts)
}

// isInstalled tells a directory whose root is elsewhere: nothing is made there.
func isInstalled(d *keystore.Dir) (bool, error) {
	var has [3]bool
	for i, name := range []string{rootFile, intermediateFile, bundleFile} {
		var err error
		if has[i], err = d.Has(name); err != nil {
			return false, err
		}
	}
	root, intermediate, bundle := has[0], has[1], has[2]
	switch {
	case root:
		return false, nil
	case intermediate:
		_, err := load(d)
		return true, err
	case bundle:
		return false, fmt.Errorf("%w: %s holds the trust bundle of a CA elsewhere; install an intermediate of that CA (ringfence ca intermediate there, ringfence ca install here)",
			ErrConflict, d.Path())
	}
	return false, nil
}

func createRoot(d *keystore.Dir, td spiffeid.TrustDomain, now time.Time) error {
	if err := checkClock(now, nil); err != nil {
		return err
	}
	root, err := newRoot(td, now)
	if err != nil {
		return err
	}
	data, err := keystore.EncodePair(root)
	if err != nil {
		return err
	}
	return d.Create(rootFile, data)
}

func ensureIntermediate(d *keystore.Dir, td spiffeid.TrustDomain, root keystore.Pair, now time.Time, opts Options) error {
	s, err := load(d)
	if err != nil || s.intermediate.Key != nil {
		return err
	}
	_, err = replaceIntermediate(d, td, root, now, opts)
	return err
}

// replaceIntermediate signs and stores a new intermediate for this directory.
func replaceIntermediate(d *keystore.Dir, td spiffeid.TrustDomain, root keystore.Pair, now time.Time, opts Options) (keystore.Pair, error) {
	if err := checkClock(now, root.Chain[0]); err != nil {
		return keystore.Pair{}, err
	}
	p, err := newIntermediate(td, "intermediate", opts.intermediateTTL(ownIntermediateTTL), root, now)
	if err != nil {
		return keystore.Pair{}, err
	}
	if err := opts.Record(issuance("intermediate", td.IDString(), "", p.Chain[0], now)); err != nil {
		return keystore.Pair{}, err
	}
	data, err := keystore.EncodePair(p)
	if err != nil {
		return keystore.Pair{}, err
	}
	return p, d.Write(intermediateFile, data)
}

// NewIntermediate makes an intermediate for another node, signed by the root in
// dir, and returns it as one PEM file: private key, certificate, and the roots
// of the trust bundle. Nothing of the key is kept. The file is as secret as the
// CA itself. It returns [ErrNoRoot] when dir has no root key.
func NewIntermediate(dir, node string, opts Options) ([]byte, error) {
	opts, err := opts.check()
	if err != nil {
		return nil, err
	}
	if err := checkNode(node); err != nil {
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
	root, err := loadRoot(d, s)
	if err != nil {
		return nil, err
	}
	return exportIntermediate(s, node, root, time.Now(), opts)
}

func exportIntermediate(s *state, node string, root keystore.Pair, now time.Time, opts Options) ([]byte, error) {
	if err := checkClock(now, root.Chain[0]); err != nil {
		return nil, err
	}
	p, err := newIntermediate(s.td, node, opts.intermediateTTL(MaxIntermediateTTL), root, now)
	if err != nil {
		return nil, err
	}
	if err := opts.Record(issuance("intermediate", s.td.IDString(), node, p.Chain[0], now)); err != nil {
		return nil, err
	}
	p.Chain = append(p.Chain, s.roots.X509Authorities()...)
	return keystore.EncodePair(p)
}

// loadRoot reads the root key. It is not kept in memory longer than one signature.
func loadRoot(d *keystore.Dir, s *state) (keystore.Pair, error) {
	root, err := loadPair(d, rootFile, s.td)
	if errors.Is(err, keystore.ErrNotExist) {
		return keystore.Pair{}, fmt.Errorf("%w: %s is missing; do this on the host where the CA was made", ErrNoRoot, d.Join(rootFile))
	}
	if err != nil {
		return keystore.Pair{}, err
	}
	if s.roots == nil || !s.roots.HasX509Authority(root.Chain[0]) {
		return keystore.Pair{}, fmt.Errorf("%w: the root in %s is not in the trust bundle; run: ringfence ca init", ErrConflict, d.Join(rootFile))
	}
	return root, nil
}

// openDir opens an existing state directory; a missing one is [ErrNoCA].
func openDir(dir string, opts Options) (*keystore.Dir, error) {
	d, err := keystore.OpenFS(dir, opts.fs)
	if errors.Is(err, keystore.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s does not exist; run: ringfence ca init, or ringfence ca install", ErrNoCA, dir)
	}
	return d, err
}

// Fingerprint is the SHA-256 of a certificate in lower-case hexadecimal, by
// which operators compare roots.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}
