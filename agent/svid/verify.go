package svid

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca"
)

// Why a peer's chain was refused. A malformed one matches [ca.ErrProfile].
var (
	// ErrForeign reports a trust domain for which there is no trust bundle.
	ErrForeign = errors.New("svid: peer of a trust domain that is not trusted")
	// ErrUntrusted reports a chain that leads to no root of its trust domain.
	ErrUntrusted = errors.New("svid: peer's chain leads to no trusted root")
	// ErrTime reports a peer's SVID that has expired or has not begun.
	ErrTime = errors.New("svid: peer's SVID is not valid now")
)

const (
	// maxChain bounds what a peer can make us parse: a leaf, an intermediate and
	// a few nested ones.
	maxChain = 8
	// maxVerdicts bounds the memory of verified peers: one takes some 200 octets.
	maxVerdicts = 4096
	// verdictTTL is how long a verdict is believed without looking again.
	verdictTTL = time.Minute
)

// verifier checks peers' chains. A chain that has passed is remembered briefly
// by its leaf: peers reconnect, and two signatures cost more than the rest of
// accepting a connection.
type verifier struct {
	// Set by init, then read-only.
	bundles x509bundle.Source
	skew    time.Duration

	mu       sync.Mutex                        // never held while verifying
	trust    map[spiffeid.TrustDomain]*trusted // one per bundle the source has
	verdicts map[[sha256.Size]byte]verdict     // passed leaves; at most maxVerdicts
}

// trusted is a trust domain's bundle in the form that verification wants. A
// changed bundle makes another one, which ends all verdicts under the old.
type trusted struct {
	authorities []*x509.Certificate
	roots       *x509.CertPool
}

type verdict struct {
	id       spiffeid.ID
	under    *trusted
	from, to time.Time // skew included
}

func (v *verifier) init(bundles x509bundle.Source, skew time.Duration) {
	v.bundles, v.skew = bundles, skew
	v.trust = make(map[spiffeid.TrustDomain]*trusted)
	v.verdicts = make(map[[sha256.Size]byte]verdict)
}

// Verify checks a peer's chain (leaf first, DER) as X.509-SVID and returns its
// SPIFFE ID: exactly one URI name, a leaf's usages, a path to the bundle of the
// leaf's own trust domain and of no other, and now within the leaf's validity,
// give or take the configured skew. CA certificates get no allowance, and none
// of them may name another trust domain. Roots that the peer sends count for
// nothing.
//
// Errors match [ca.ErrProfile], [ErrForeign], [ErrUntrusted] or [ErrTime].
func (s *Store) Verify(chain [][]byte) (spiffeid.ID, error) {
	id, err := s.verifier.verify(chain, time.Now())
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("verify peer: %w", err)
	}
	return id, nil
}

func (v *verifier) verify(chain [][]byte, now time.Time) (spiffeid.ID, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return spiffeid.ID{}, fmt.Errorf("%w: %d certificates, must be 1 to %d", ca.ErrProfile, len(chain), maxChain)
	}
	sum := sha256.Sum256(chain[0])
	if id, ok := v.known(sum, now); ok {
		return id, nil
	}
	certs, err := parse(chain)
	if err != nil {
		return spiffeid.ID{}, err
	}
	verdict, err := v.judge(certs, now)
	if err != nil {
		return spiffeid.ID{}, err
	}
	v.remember(sum, verdict)
	return verdict.id, nil
}

func parse(chain [][]byte) ([]*x509.Certificate, error) {
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d of the chain: %w", ca.ErrProfile, i+1, err)
		}
		certs[i] = cert
	}
	return certs, nil
}

// judge decides about a chain that is not known.
func (v *verifier) judge(certs []*x509.Certificate, now time.Time) (verdict, error) {
	leaf := certs[0]
	id, err := ca.CheckLeaf(leaf)
	if err != nil {
		return verdict{}, err
	}
	trust, err := v.trustFor(id.TrustDomain())
	if err != nil {
		return verdict{}, fmt.Errorf("%s: %w", id, err)
	}
	from, to := leaf.NotBefore.Add(-v.skew), leaf.NotAfter.Add(v.skew)
	if now.Before(from) || now.After(to) {
		return verdict{}, fmt.Errorf("%s: %w: it runs from %s to %s and it is %s here", id, ErrTime,
			stamp(leaf.NotBefore), stamp(leaf.NotAfter), stamp(now))
	}
	end, err := trust.verify(certs, id.TrustDomain(), clamp(now, leaf.NotBefore, leaf.NotAfter))
	if err != nil {
		return verdict{}, fmt.Errorf("%s: %w", id, err)
	}
	return verdict{id: id, under: trust, from: from, to: earliest(to, end, now.Add(verdictTTL))}, nil
}

// verify finds a path to a root at the given time that consists of CAs as they
// should be, and returns when the first CA on it ends.
func (t *trusted) verify(certs []*x509.Certificate, td spiffeid.TrustDomain, at time.Time) (end time.Time, err error) {
	between := x509.NewCertPool()
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	paths, err := certs[0].Verify(x509.VerifyOptions{
		Roots: t.roots, Intermediates: between, CurrentTime: at,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // CheckLeaf has looked at the leaf's, checkPath does at the others'
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	for _, path := range paths {
		if end, err = checkPath(path[1:], td); err == nil {
			return end, nil
		}
	}
	return time.Time{}, fmt.Errorf("%w: %w", ErrUntrusted, err)
}

// checkPath holds the CA certificates of a path to the profile. Without it, an
// intermediate that says it is of another trust domain would be believed because
// its root is ours.
func checkPath(issuers []*x509.Certificate, td spiffeid.TrustDomain) (end time.Time, err error) {
	if len(issuers) == 0 {
		return time.Time{}, fmt.Errorf("%w: a leaf stands in the trust bundle itself", ca.ErrProfile)
	}
	for i, c := range issuers {
		if err := ca.CheckCA(c, td); err != nil {
			return time.Time{}, err
		}
		if i == 0 || c.NotAfter.Before(end) {
			end = c.NotAfter
		}
		if i < len(issuers)-1 && !anyTLSUse(c) {
			return time.Time{}, fmt.Errorf("%w: an intermediate is not for TLS", ca.ErrProfile)
		}
	}
	return end, nil
}

// anyTLSUse reports whether an intermediate's extended key usage, which limits
// what it may sign for, leaves room for both sides of TLS.
func anyTLSUse(c *x509.Certificate) bool {
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return true
	}
	return slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
}

// trustFor returns the current bundle of td. The source is asked every time, and
// a bundle counts as unchanged when it holds the same certificates.
func (v *verifier) trustFor(td spiffeid.TrustDomain) (*trusted, error) {
	bundle, err := v.bundles.GetX509BundleForTrustDomain(td)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	if bundle.TrustDomain() != td {
		return nil, fmt.Errorf("%w: the source answered with the bundle of %s", ErrForeign, bundle.TrustDomain())
	}
	authorities := bundle.X509Authorities()
	v.mu.Lock()
	defer v.mu.Unlock()
	if old := v.trust[td]; old != nil && slices.EqualFunc(old.authorities, authorities, sameCert) {
		return old, nil
	}
	t := &trusted{authorities: authorities, roots: x509.NewCertPool()}
	for _, c := range authorities {
		t.roots.AddCert(c)
	}
	v.trust[td] = t
	return t, nil
}

func sameCert(a, b *x509.Certificate) bool { return a == b || a.Equal(b) }

func (v *verifier) known(sum [sha256.Size]byte, now time.Time) (spiffeid.ID, bool) {
	v.mu.Lock()
	known, ok := v.verdicts[sum]
	v.mu.Unlock()
	if !ok || now.Before(known.from) || now.After(known.to) {
		return spiffeid.ID{}, false
	}
	trust, err := v.trustFor(known.id.TrustDomain())
	return known.id, err == nil && trust == known.under
}

func (v *verifier) remember(sum [sha256.Size]byte, d verdict) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.verdicts) >= maxVerdicts {
		// Any one will do: it costs its peer one verification.
		for k := range v.verdicts {
			delete(v.verdicts, k)
			break
		}
	}
	v.verdicts[sum] = d
}

func clamp(t, from, to time.Time) time.Time {
	if t.Before(from) {
		return from
	}
	return earliest(t, to)
}

func earliest(t time.Time, others ...time.Time) time.Time {
	for _, o := range others {
		if o.Before(t) {
			t = o
		}
	}
	return t
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
