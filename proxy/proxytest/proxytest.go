// Package proxytest holds strict fakes of what the relay is given: identities,
// decisions, credentials and a network. They fail the test on a call that the
// relay must not make, and record those it does make.
//
// It is for tests of proxy and of whatever wires it.
package proxytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// CA is a certificate authority of one trust domain, and the credentials of
// every workload it has made a certificate for.
type CA struct {
	tb     testing.TB
	domain spiffeid.TrustDomain
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate

	mint   sync.Mutex
	mu     sync.Mutex
	leaves map[spiffeid.ID]*tls.Certificate
	serial int64
	trust  []*CA // whose leaves Verify accepts beside its own
}

// NewCA makes an authority for a trust domain.
func NewCA(tb testing.TB, domain string) *CA {
	tb.Helper()
	c := &CA{
		tb: tb, domain: spiffeid.RequireTrustDomainFromString(domain),
		leaves: make(map[spiffeid.ID]*tls.Certificate), serial: 1,
	}
	c.key = newKey(tb)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: domain},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{c.domain.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, c.key.Public(), c.key)
	if err != nil {
		tb.Fatal(err)
	}
	if c.cert, err = x509.ParseCertificate(der); err != nil {
		tb.Fatal(err)
	}
	return c
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// Leaf says how a certificate differs from a good one.
type Leaf struct {
	ID        string        // default spiffe://domain/ns/test/sa/leaf
	ExpiresIn time.Duration // default 1 h; negative: expired
	Usage     []x509.ExtKeyUsage
	NoURI     bool
}

// Issue makes a certificate without keeping it.
func (c *CA) Issue(l Leaf) *tls.Certificate {
	c.tb.Helper()
	if l.ID == "" {
		l.ID = c.domain.ID().String() + "/ns/test/sa/leaf"
	}
	if l.ExpiresIn == 0 {
		l.ExpiresIn = time.Hour
	}
	if l.Usage == nil {
		l.Usage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	c.mu.Lock()
	c.serial++
	serial := c.serial
	c.mu.Unlock()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		NotBefore:    time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(l.ExpiresIn),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: l.Usage, BasicConstraintsValid: true,
	}
	if !l.NoURI {
		template.URIs = []*url.URL{spiffeid.RequireFromString(l.ID).URL()}
	}
	key := newKey(c.tb)
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	if err != nil {
		c.tb.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, c.cert.Raw}, PrivateKey: key}
}

// Trust makes Verify accept what other has issued.
func (c *CA) Trust(other *CA) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trust = append(c.trust, other)
}

// Renew replaces id's certificate, which the next Certificate call returns.
func (c *CA) Renew(id spiffeid.ID) *tls.Certificate {
	cert := c.Issue(Leaf{ID: id.String()})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaves[id] = cert
	return cert
}

// Use makes cert what Certificate returns for id, whatever is in it.
func (c *CA) Use(id spiffeid.ID, cert *tls.Certificate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaves[id] = cert
}

// Certificate returns id's certificate, making it at first use.
func (c *CA) Certificate(_ context.Context, id spiffeid.ID) (*tls.Certificate, error) {
	if id.IsZero() {
		c.tb.Error("certificate asked for without an identity")
		return nil, errors.New("no identity")
	}
	c.mint.Lock() // so that all who ask first get the same one
	defer c.mint.Unlock()
	c.mu.Lock()
	cert := c.leaves[id]
	c.mu.Unlock()
	if cert == nil {
		cert = c.Renew(id)
	}
	return cert, nil
}

// Verify checks a chain against the authority of the leaf's trust domain.
func (c *CA) Verify(chain [][]byte) (spiffeid.ID, error) {
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	if len(leaf.URIs) != 1 {
		return spiffeid.ID{}, errors.New("not exactly one URI")
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	roots := x509.NewCertPool()
	c.mu.Lock()
	for _, ca := range append([]*CA{c}, c.trust...) {
		if ca.domain == id.TrustDomain() {
			roots.AddCert(ca.cert)
		}
	}
	c.mu.Unlock()
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return id, err
}
