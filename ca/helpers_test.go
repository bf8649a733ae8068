package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"ringfence.dev/ca/keystore"
)

var lab = spiffeid.RequireTrustDomainFromString("lab.test")

// sleepTo2030 is how tests with a false clock begin: theirs starts in 2000, before
// this program was built.
func sleepTo2030() {
	time.Sleep(time.Until(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)))
}

func TestMain(m *testing.M) {
	childInit()
	goleak.VerifyTestMain(m)
}

func newCADir(t testing.TB, opts Options) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	created, err := Init(dir, lab, opts)
	if err != nil || !created {
		t.Fatalf("Init = %v, %v", created, err)
	}
	return dir
}

func mustOpen(t testing.TB, dir string, opts Options) *Authority {
	t.Helper()
	a, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newAuthority(t testing.TB) *Authority {
	t.Helper()
	return mustOpen(t, newCADir(t, Options{}), Options{})
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func mustIssue(t testing.TB, a *Authority, id string, ttl time.Duration) []*x509.Certificate {
	t.Helper()
	chain, err := a.Issue(context.Background(), spiffeid.RequireFromString(id), newKey(t).Public(), ttl)
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

func mustSign(t testing.TB, tmpl *x509.Certificate, issuer *keystore.Pair, key crypto.Signer) *x509.Certificate {
	t.Helper()
	parent, signer := tmpl, key
	if issuer != nil {
		parent, signer = issuer.Chain[0], issuer.Key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// mustCA makes a CA for td; a nil issuer makes a root. edit changes its template.
func mustCA(t testing.TB, td spiffeid.TrustDomain, pathLen int, issuer *keystore.Pair, edit func(*x509.Certificate)) keystore.Pair {
	t.Helper()
	key := newKey(t)
	tmpl := caTemplate(td, "test", pathLen, []byte(newSerial().String()[:20]), windowAt(time.Now(), 24*time.Hour, nil))
	if edit != nil {
		edit(tmpl)
	}
	return keystore.Pair{Key: key, Chain: []*x509.Certificate{mustSign(t, tmpl, issuer, key)}}
}

func mustPEM(t testing.TB, p keystore.Pair) []byte {
	t.Helper()
	data, err := keystore.EncodePair(p)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func mustURL(t testing.TB, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

type certTemplate = x509.Certificate
