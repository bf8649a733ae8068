package svid

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	lab   = spiffeid.RequireTrustDomainFromString("lab.test")
	other = spiffeid.RequireTrustDomainFromString("other.test")
	web   = spiffeid.RequireFromString("spiffe://lab.test/ns/b/sa/web")
)

func idN(n int) spiffeid.ID {
	return spiffeid.RequireFromPath(lab, fmt.Sprintf("/ns/b/sa/w%04d", n))
}

// authority is a CA of one key pair: a root, or an intermediate over chain.
type authority struct {
	key   *ecdsa.PrivateKey
	chain []*x509.Certificate // own certificate first, without the root, unless it is one
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	return n
}

// newCA makes a CA for td under issuer, self-signed for nil. edit may be nil.
func newCA(t testing.TB, td spiffeid.TrustDomain, issuer *authority, edit func(*x509.Certificate)) *authority {
	t.Helper()
	n := serial()
	tmpl := &x509.Certificate{
		SerialNumber: n, Subject: pkix.Name{CommonName: n.String()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		URIs: []*url.URL{td.ID().URL()}, KeyUsage: x509.KeyUsageCertSign,
		BasicConstraintsValid: true, IsCA: true,
	}
	if edit != nil {
		edit(tmpl)
	}
	a := &authority{key: newKey(t)}
	parent, signer := tmpl, a.key
	if issuer != nil {
		parent, signer = issuer.chain[0], issuer.key
	}
	a.chain = []*x509.Certificate{mustSign(t, tmpl, parent, a.key.Public(), signer)}
	return a
}

func mustSign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	cert, err := signCert(tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func signCert(tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// leaf signs an SVID for id that lives an hour from now, as edited.
func (a *authority) leaf(pub crypto.PublicKey, id spiffeid.ID, edit func(*x509.Certificate)) (*x509.Certificate, error) {
	tmpl := &x509.Certificate{
		SerialNumber: serial(), NotBefore: time.Now().Add(-5 * time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if edit != nil {
		edit(tmpl)
	}
	return signCert(tmpl, a.chain[0], pub, a.key)
}

func (a *authority) mustLeaf(t testing.TB, id spiffeid.ID, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	cert, err := a.leaf(newKey(t).Public(), id, edit)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func der(certs ...*x509.Certificate) [][]byte {
	var out [][]byte
	for _, c := range certs {
		out = append(out, c.Raw)
	}
	return out
}

func bundleOf(td spiffeid.TrustDomain, roots ...*authority) *x509bundle.Bundle {
	b := x509bundle.New(td)
	for _, r := range roots {
		b.AddX509Authority(r.chain[0])
	}
	return b
}

// issuer is a fake CA that fails, stalls or lies on demand.
type issuer struct {
	t  testing.TB
	ca *authority

	mu    sync.Mutex
	ttl   time.Duration // zero: an hour
	err   error
	delay time.Duration
	edit  func(*x509.Certificate)
	calls map[spiffeid.ID]int
	live  int
	peak  int // most calls at once
}

func newIssuer(t testing.TB) *issuer {
	return &issuer{t: t, ca: newCA(t, lab, nil, nil), calls: make(map[spiffeid.ID]int)}
}

func (i *issuer) set(f func(*issuer)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f(i)
}

func (i *issuer) count(id spiffeid.ID) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.calls[id]
}

func (i *issuer) Issue(ctx context.Context, id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	i.mu.Lock()
	i.calls[id]++
	i.live++
	i.peak = max(i.peak, i.live)
	err, delay, edit, life := i.err, i.delay, i.edit, i.ttl
	i.mu.Unlock()
	defer i.set(func(i *issuer) { i.live-- })
	if ttl == 0 {
		ttl = life
	}
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err != nil {
		return nil, err
	}
	cert, err := i.ca.leaf(pub, id, func(c *x509.Certificate) {
		if ttl > 0 {
			c.NotAfter = time.Now().Add(ttl)
		}
		if edit != nil {
			edit(c)
		}
	})
	if err != nil {
		return nil, err
	}
	return []*x509.Certificate{cert}, nil
}

var errDown = errors.New("the CA is down")

func newStore(t testing.TB, i *issuer, edit func(*Config)) *Store {
	t.Helper()
	cfg := Config{Issuer: i, Bundles: bundleOf(lab, i.ca)}
	if edit != nil {
		edit(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// start runs the store until the test ends.
func start(t *testing.T, s *Store) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

func mustGet(t testing.TB, s *Store, id spiffeid.ID) *tls.Certificate {
	t.Helper()
	cert, err := s.Certificate(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	if !time.Now().Before(cert.Leaf.NotAfter) {
		t.Fatalf("expired at %v, handed out at %v", cert.Leaf.NotAfter, time.Now())
	}
	return cert
}

type issuerFunc func() ([]*x509.Certificate, error)

func (f issuerFunc) Issue(context.Context, spiffeid.ID, crypto.PublicKey, time.Duration) ([]*x509.Certificate, error) {
	return f()
}
