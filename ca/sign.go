package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca/keystore"
)

// window is a certificate's period of validity.
type window struct{ from, to time.Time }

// windowAt gives a certificate signed at now a life of ttl, backdated, inside
// the issuer's own period: a certificate that outlives its issuer is a lie.
func windowAt(now time.Time, ttl time.Duration, issuer *x509.Certificate) window {
	w := window{from: now.Add(-Backdate), to: now.Add(ttl)}
	if issuer == nil {
		return w
	}
	if w.from.Before(issuer.NotBefore) {
		w.from = issuer.NotBefore
	}
	if w.to.After(issuer.NotAfter) {
		w.to = issuer.NotAfter
	}
	return w
}

// newSerial returns 158 random bits in 20 octets, the most RFC 5280 section
// 4.1.2.2 allows. The second bit is set, so that the length tells nothing.
func newSerial() *big.Int {
	var b [20]byte
	rand.Read(b[:])
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b[:])
}

// keyID is a key identifier by RFC 7093 section 2, method 1.
func keyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return sum[:20], nil
}

// leafTemplate is the X.509-SVID profile. The subject stays empty: the URI is
// the only name, and crypto/x509 then marks the alternative name critical.
func leafTemplate(id spiffeid.ID, ski []byte, w window) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          newSerial(),
		NotBefore:             w.from,
		NotAfter:              w.to,
		URIs:                  []*url.URL{id.URL()},
		SubjectKeyId:          ski,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
}

// caTemplate is a root or an intermediate. pathLen counts the CA certificates
// that may follow. The serial number in the name keeps two CAs of one trust
// domain apart for software that looks issuers up by name.
func caTemplate(td spiffeid.TrustDomain, name string, pathLen int, ski []byte, w window) *x509.Certificate {
	serial := newSerial()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject: pkix.Name{
			Organization: []string{"ringfence"},
			CommonName:   name,
			SerialNumber: hex.EncodeToString(serial.Bytes()),
		},
		NotBefore:             w.from,
		NotAfter:              w.to,
		URIs:                  []*url.URL{td.ID().URL()},
		SubjectKeyId:          ski,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            pathLen,
		MaxPathLenZero:        pathLen == 0,
	}
}

// sign makes the certificate and reads it back, so that what is returned is what
// a peer will see. A nil issuer means that key signs for itself.
func sign(tmpl, issuer *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	if issuer == nil {
		issuer = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back signed certificate: %w", err)
	}
	return cert, nil
}

func newRoot(td spiffeid.TrustDomain, now time.Time) (keystore.Pair, error) {
	return newCA(td, "root", 1, windowAt(now, RootTTL, nil), keystore.Pair{})
}

// newIntermediate makes an intermediate under root, for SVIDs only: its path
// length is zero, so it cannot make further CAs.
func newIntermediate(td spiffeid.TrustDomain, name string, ttl time.Duration, root keystore.Pair, now time.Time) (keystore.Pair, error) {
	if !now.Before(root.Chain[0].NotAfter) {
		return keystore.Pair{}, fmt.Errorf("%w: the root ended at %s", ErrExpired, stamp(root.Chain[0].NotAfter))
	}
	return newCA(td, name, 0, windowAt(now, ttl, root.Chain[0]), root)
}

// newCA makes a key and its certificate; a zero issuer means self-signed.
func newCA(td spiffeid.TrustDomain, name string, pathLen int, w window, issuer keystore.Pair) (keystore.Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keystore.Pair{}, fmt.Errorf("generate CA key: %w", err)
	}
	ski, err := keyID(key.Public())
	if err != nil {
		return keystore.Pair{}, err
	}
	var parent *x509.Certificate
	signer := crypto.Signer(key)
	if issuer.Key != nil {
		parent, signer = issuer.Chain[0], issuer.Key
	}
	cert, err := sign(caTemplate(td, name, pathLen, ski, w), parent, key.Public(), signer)
	if err != nil {
		return keystore.Pair{}, err
	}
	return keystore.Pair{Key: key, Chain: []*x509.Certificate{cert}}, CheckCA(cert, td)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
