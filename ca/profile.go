package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxID is the longest SPIFFE ID in octets, SPIFFE-ID section 2.3.
const maxID = 2048

var (
	oidSAN      = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasic    = asn1.ObjectIdentifier{2, 5, 29, 19}
)

// Context tags of GeneralName, RFC 5280 section 4.2.1.6.
const tagURI = 6

// CheckLeaf reports whether cert is a leaf X.509-SVID, and whose. It looks at
// the certificate alone: not at its signature, and not at the time. Every
// failure matches [ErrProfile].
//
// It is stricter than the X509-SVID standard in one point: section 4.4 makes
// the extended key usage optional, and we ask for it, because a certificate
// without one is good for anything and was made for something else.
func CheckLeaf(cert *x509.Certificate) (spiffeid.ID, error) {
	id, err := soleID(cert)
	if err != nil {
		return spiffeid.ID{}, err
	}
	switch usage := cert.KeyUsage; {
	case id.Path() == "":
		return id, broken("the SPIFFE ID %s has no path, which only a CA may show (section 2)", id)
	case cert.IsCA:
		return id, broken("a leaf must not be a CA (section 4.1)")
	case !hasCritical(cert, oidKeyUsage):
		return id, broken("key usage must be present and critical (section 4.3)")
	case usage&x509.KeyUsageDigitalSignature == 0:
		return id, broken("key usage lacks digitalSignature (section 4.3)")
	case usage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return id, broken("a leaf must not have keyCertSign or cRLSign (section 4.3)")
	case !hasUsage(cert, x509.ExtKeyUsageServerAuth) || !hasUsage(cert, x509.ExtKeyUsageClientAuth):
		return id, broken("extended key usage must hold serverAuth and clientAuth (section 4.4)")
	case emptySubject(cert) && !hasCritical(cert, oidSAN):
		return id, broken("the subject is empty, so the alternative name must be critical (RFC 5280 section 4.2.1.6)")
	}
	return id, wrapProfile(CheckKey(cert.PublicKey))
}

// CheckCA reports whether cert may sign for the trust domain: a CA with
// keyCertSign and critical basic constraints that names td, without a path, or
// names nobody. Failures match [ErrProfile], another trust domain [ErrForeign] too.
func CheckCA(cert *x509.Certificate, td spiffeid.TrustDomain) error {
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return broken("not a CA certificate")
	case !hasCritical(cert, oidBasic):
		return broken("basic constraints of a CA must be critical (RFC 5280 section 4.2.1.9)")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return broken("a CA must have keyCertSign (section 4.3)")
	}
	if err := CheckKey(cert.PublicKey); err != nil {
		return wrapProfile(err)
	}
	named, err := caTrustDomain(cert)
	if err != nil {
		return err
	}
	if !named.IsZero() && named != td {
		return fmt.Errorf("%w: %w: the CA certificate is of %s, not of %s", ErrProfile, ErrForeign, named, td)
	}
	return nil
}

// caTrustDomain returns the trust domain that a CA certificate names, zero for
// none: the standard says SHOULD, and foreign upstream CAs often do not.
func caTrustDomain(cert *x509.Certificate) (spiffeid.TrustDomain, error) {
	uris, err := uriNames(cert)
	if err != nil || len(uris) == 0 {
		return spiffeid.TrustDomain{}, err
	}
	id, err := soleID(cert)
	if err != nil {
		return spiffeid.TrustDomain{}, err
	}
	if id.Path() != "" {
		return spiffeid.TrustDomain{}, broken("the SPIFFE ID %s of a CA must not have a path (section 2)", id)
	}
	return id.TrustDomain(), nil
}

// soleID returns the SPIFFE ID in the certificate's only URI name.
func soleID(cert *x509.Certificate) (spiffeid.ID, error) {
	uris, err := uriNames(cert)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if len(uris) != 1 {
		return spiffeid.ID{}, broken("%d URI names, must be exactly one (section 2)", len(uris))
	}
	return parseID(uris[0])
}

func parseID(uri string) (spiffeid.ID, error) {
	if len(uri) > maxID {
		return spiffeid.ID{}, broken("SPIFFE ID of %d octets, must be at most %d (SPIFFE-ID section 2.3)", len(uri), maxID)
	}
	id, err := spiffeid.FromString(uri)
	if err != nil {
		return spiffeid.ID{}, broken("%q: %v", uri, err)
	}
	return id, nil
}

// uriNames returns the URI names as they stand in the certificate. The parsed
// cert.URIs will not do: net/url drops an empty fragment, so that two different
// names would read as one ID.
func uriNames(cert *x509.Certificate) ([]string, error) {
	for _, e := range cert.Extensions {
		if e.Id.Equal(oidSAN) {
			return uriNamesIn(e)
		}
	}
	return nil, nil
}

func uriNamesIn(san pkix.Extension) ([]string, error) {
	names, err := generalNames(san)
	if err != nil {
		return nil, err
	}
	var uris []string
	for _, n := range names {
		if n.Class == asn1.ClassContextSpecific && n.Tag == tagURI {
			uris = append(uris, string(n.Bytes))
		}
	}
	return uris, nil
}

func generalNames(san pkix.Extension) ([]asn1.RawValue, error) {
	var names []asn1.RawValue
	rest, err := asn1.Unmarshal(san.Value, &names)
	if err != nil || len(rest) != 0 {
		return nil, broken("malformed subject alternative name")
	}
	return names, nil
}

// CheckKey reports whether a public key is strong enough to be certified:
// ECDSA on P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits. Failures match
// [ErrRefused]. The upper bound keeps a peer from buying our CPU with one key.
func CheckKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k == nil || (k.Curve != elliptic.P256() && k.Curve != elliptic.P384()) {
			return fmt.Errorf("%w: ECDSA keys must be on P-256 or P-384", ErrRefused)
		}
		if _, err := k.ECDH(); err != nil {
			return fmt.Errorf("%w: the ECDSA key is not a point on its curve", ErrRefused)
		}
		return nil
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize {
			return fmt.Errorf("%w: malformed Ed25519 key", ErrRefused)
		}
		return nil
	case *rsa.PublicKey:
		if k == nil || k.N == nil || k.N.BitLen() < 2048 || k.N.BitLen() > 8192 || k.E < 65537 || k.E&1 == 0 {
			return fmt.Errorf("%w: RSA keys must have 2048 to 8192 bits and an odd exponent of 65537 or more", ErrRefused)
		}
		return nil
	default:
		return fmt.Errorf("%w: keys of type %T are not certified", ErrRefused, pub)
	}
}

func hasUsage(cert *x509.Certificate, want x509.ExtKeyUsage) bool {
	return slices.Contains(cert.ExtKeyUsage, want)
}

func hasCritical(cert *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	for i := range cert.Extensions {
		if cert.Extensions[i].Id.Equal(oid) {
			return cert.Extensions[i].Critical
		}
	}
	return false
}

// emptySubject looks at the encoding: an empty SEQUENCE.
func emptySubject(cert *x509.Certificate) bool {
	return len(cert.RawSubject) == 2
}

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProfile}, args...)...)
}

func wrapProfile(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrProfile, err)
}

// checkNode accepts what can stand in a certificate's common name: 1 to 63 of
// the letters that host names are made of, RFC 5280 ub-common-name being 64.
func checkNode(name string) error {
	bad := strings.IndexFunc(name, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_", r)
	}) >= 0
	if bad || name == "" || len(name) > 63 {
		return fmt.Errorf("%w: node name %q must be 1 to 63 letters, digits, dots, hyphens and underscores", ErrRefused, name)
	}
	return nil
}
