package traffic_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca"
)

// authority is a root whose key the test holds, as somebody would who broke
// into the CA: so certificates can be made that the CA itself never would.
type authority struct {
	key  crypto.Signer
	cert *x509.Certificate
}

// readAuthority takes the root out of a CA's state directory.
func readAuthority(t *testing.T, dir string) (a authority) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		var err error
		switch block.Type {
		case "CERTIFICATE":
			a.cert, err = x509.ParseCertificate(block.Bytes)
		default:
			var key any
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
			a.key, _ = key.(crypto.Signer)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if a.key == nil || a.cert == nil {
		t.Fatalf("%s holds no key with its certificate", dir)
	}
	return a
}

// newAuthority makes a CA of its own for a trust domain.
func newAuthority(t *testing.T, td string) authority {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Init(dir, spiffeid.RequireTrustDomainFromString(td), ca.Options{}); err != nil {
		t.Fatal(err)
	}
	return readAuthority(t, dir)
}

// leaf makes a certificate for an ID, good unless change makes it otherwise.
func (a authority) leaf(t *testing.T, id string, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// chained is a certificate for the king, signed by a leaf that had no right to sign.
func chained(t *testing.T, by tls.Certificate) tls.Certificate {
	t.Helper()
	parent, err := x509.ParseCertificate(by.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	c := authority{by.PrivateKey.(crypto.Signer), parent}.leaf(t, "spiffe://lab.test/ns/a/sa/king", nil)
	c.Certificate = append(c.Certificate, by.Certificate...)
	return c
}
