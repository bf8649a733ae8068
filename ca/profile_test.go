package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// tbs is RFC 5280 section 4.1, read without crypto/x509: the judge of what we
// issue should not be the library that wrote it.
type tbs struct {
	Raw        asn1.RawContent
	Version    int `asn1:"optional,explicit,default:0,tag:0"`
	Serial     *big.Int
	SigAlg     pkix.AlgorithmIdentifier
	Issuer     asn1.RawValue
	Validity   struct{ NotBefore, NotAfter time.Time }
	Subject    asn1.RawValue
	PublicKey  asn1.RawValue
	UniqueID   asn1.BitString   `asn1:"optional,tag:1"`
	SubjectUID asn1.BitString   `asn1:"optional,tag:2"`
	Extensions []pkix.Extension `asn1:"omitempty,optional,explicit,tag:3"`
}

func readTBS(t *testing.T, cert *x509.Certificate) tbs {
	t.Helper()
	var out tbs
	if rest, err := asn1.Unmarshal(cert.RawTBSCertificate, &out); err != nil || len(rest) != 0 {
		t.Fatalf("read certificate: %v, %d bytes left", err, len(rest))
	}
	return out
}

func (c tbs) ext(t *testing.T, oid string) pkix.Extension {
	t.Helper()
	var found []pkix.Extension
	for _, e := range c.Extensions {
		if e.Id.String() == oid {
			found = append(found, e)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d extensions %s, want 1", len(found), oid)
	}
	return found[0]
}

// TestX509SVID_LeafInDER holds an issued leaf, octet by octet, to the X509-SVID standard.
func TestX509SVID_LeafInDER(t *testing.T) {
	chain := mustIssue(t, newAuthority(t), "spiffe://lab.test/ns/b/sa/web", 0)
	leaf := readTBS(t, chain[0])

	if leaf.Version != 2 {
		t.Errorf("version %d, want 2 (v3)", leaf.Version)
	}
	if leaf.Serial.Sign() <= 0 || leaf.Serial.BitLen() < 128 || leaf.Serial.BitLen() > 159 {
		t.Errorf("serial of %d bits, want 128 to 159", leaf.Serial.BitLen())
	}
	if !bytes.Equal(leaf.Subject.FullBytes, []byte{0x30, 0}) {
		t.Errorf("subject % x, want empty", leaf.Subject.FullBytes)
	}
	want := map[string]struct {
		critical bool
		value    []byte
	}{
		"2.5.29.15": {true, []byte{3, 2, 7, 0x80}}, // digitalSignature and nothing else, section 4.3
		"2.5.29.19": {true, []byte{0x30, 0}},       // cA FALSE is the DER default, section 4.1
		"2.5.29.37": {false, []byte{0x30, 20, // serverAuth, clientAuth, section 4.4
			6, 8, 43, 6, 1, 5, 5, 7, 3, 1, 6, 8, 43, 6, 1, 5, 5, 7, 3, 2}},
		"2.5.29.17": {true, append([]byte{0x30, 31, 0x86, 29}, "spiffe://lab.test/ns/b/sa/web"...)}, // section 2
	}
	for oid, w := range want {
		if e := leaf.ext(t, oid); e.Critical != w.critical || !bytes.Equal(e.Value, w.value) {
			t.Errorf("%s: critical %v, % x; want %v, % x", oid, e.Critical, e.Value, w.critical, w.value)
		}
	}
	if e := leaf.ext(t, "2.5.29.35"); !bytes.HasSuffix(e.Value, chain[1].SubjectKeyId) {
		t.Errorf("authority key id % x does not end in the issuer's % x", e.Value, chain[1].SubjectKeyId)
	}
	leaf.ext(t, "2.5.29.14")
	if len(leaf.Extensions) != 6 {
		t.Errorf("%d extensions, want 6", len(leaf.Extensions))
	}
	if life := leaf.Validity.NotAfter.Sub(leaf.Validity.NotBefore); life > time.Hour+Backdate || life < time.Hour {
		t.Errorf("life %v", life)
	}
}

// TestX509SVID_SigningCertificatesInDER does the same for root and intermediate.
func TestX509SVID_SigningCertificatesInDER(t *testing.T) {
	a := newAuthority(t)
	chain := mustIssue(t, a, "spiffe://lab.test/a", 0)
	roots, err := a.GetX509BundleForTrustDomain(lab)
	if err != nil {
		t.Fatal(err)
	}
	root := roots.X509Authorities()[0]
	for _, c := range []struct {
		name    string
		cert    *x509.Certificate
		basic   []byte
		longest time.Duration
	}{
		{"root", root, []byte{0x30, 6, 1, 1, 0xff, 2, 1, 1}, RootTTL},
		{"intermediate", chain[1], []byte{0x30, 6, 1, 1, 0xff, 2, 1, 0}, MaxIntermediateTTL},
	} {
		got := readTBS(t, c.cert)
		if e := got.ext(t, "2.5.29.19"); !e.Critical || !bytes.Equal(e.Value, c.basic) {
			t.Errorf("%s: basic constraints %v % x, want % x", c.name, e.Critical, e.Value, c.basic)
		}
		if e := got.ext(t, "2.5.29.15"); !e.Critical || !bytes.Equal(e.Value, []byte{3, 2, 1, 6}) {
			t.Errorf("%s: key usage %v % x, want keyCertSign and cRLSign", c.name, e.Critical, e.Value)
		}
		if e := got.ext(t, "2.5.29.17"); !bytes.Equal(e.Value, append([]byte{0x30, 19, 0x86, 17}, "spiffe://lab.test"...)) {
			t.Errorf("%s: names %q, want the trust domain without a path", c.name, e.Value)
		}
		if len(c.cert.SubjectKeyId) != 20 {
			t.Errorf("%s: subject key id of %d octets", c.name, len(c.cert.SubjectKeyId))
		}
		if life := got.Validity.NotAfter.Sub(got.Validity.NotBefore); life > c.longest+Backdate {
			t.Errorf("%s: lives for %v", c.name, life)
		}
		if k, ok := c.cert.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
			t.Errorf("%s: key %T", c.name, c.cert.PublicKey)
		}
	}
	if !bytes.Equal(chain[1].AuthorityKeyId, root.SubjectKeyId) {
		t.Error("the intermediate does not point to the root")
	}
}

// Another implementation of the standard agrees.
func TestGoSPIFFEVerifiesOurs(t *testing.T) {
	a := newAuthority(t)
	chain := mustIssue(t, a, "spiffe://lab.test/ns/b/sa/web", 0)
	id, _, err := x509svid.Verify(chain, a)
	if err != nil || id.String() != "spiffe://lab.test/ns/b/sa/web" {
		t.Errorf("x509svid.Verify = %v, %v", id, err)
	}
}

func TestCheckLeafRefuses(t *testing.T) {
	issuer := mustCA(t, lab, 0, nil, nil)
	id := spiffeid.RequireFromString("spiffe://lab.test/ns/b/sa/web")
	uri := func(texts ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, s := range texts {
				c.URIs = append(c.URIs, mustURL(t, s))
			}
		}
	}
	rawSAN := func(critical bool, texts ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			var names []asn1.RawValue
			for _, s := range texts {
				names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tagURI, Bytes: []byte(s)})
			}
			value, err := asn1.Marshal(names)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = nil
			c.ExtraExtensions = []pkix.Extension{{Id: oidSAN, Critical: critical, Value: value}}
		}
	}
	long := "spiffe://lab.test/" + strings.Repeat("a", 2048-18)
	cases := []struct {
		name string
		ok   bool
		edit func(*x509.Certificate)
	}{
		{"as issued", true, func(*x509.Certificate) {}},
		{"longest ID", true, uri(long)},
		{"DNS name beside", true, func(c *x509.Certificate) { c.DNSNames = []string{"web"} }},
		{"subject and uncritical names", true, func(c *x509.Certificate) {
			rawSAN(false, id.String())(c)
			c.Subject.CommonName = "web"
		}},
		{"no name", false, uri()},
		{"DNS name only", false, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"lab.test"} }},
		{"two names", false, uri("spiffe://lab.test/a", "spiffe://lab.test/b")},
		{"the same name twice", false, uri("spiffe://lab.test/a", "spiffe://lab.test/a")},
		{"a second URI of another kind", false, uri("spiffe://lab.test/a", "https://lab.test/")},
		{"no path", false, uri("spiffe://lab.test")},
		{"empty path", false, uri("spiffe://lab.test/")},
		{"other scheme", false, uri("https://lab.test/a")},
		{"upper-case scheme", false, rawSAN(true, "SPIFFE://lab.test/a")},
		{"upper-case trust domain", false, uri("spiffe://LAB.test/a")},
		{"port", false, uri("spiffe://lab.test:80/a")},
		{"user", false, uri("spiffe://u@lab.test/a")},
		{"query", false, uri("spiffe://lab.test/a?b")},
		{"empty query", false, rawSAN(true, "spiffe://lab.test/a?")},
		{"fragment", false, uri("spiffe://lab.test/a#b")},
		{"empty fragment", false, rawSAN(true, "spiffe://lab.test/a#")},
		{"dot segment", false, uri("spiffe://lab.test/a/../b")},
		{"empty segment", false, uri("spiffe://lab.test/a//b")},
		{"trailing slash", false, uri("spiffe://lab.test/a/")},
		{"percent", false, uri("spiffe://lab.test/%61")},
		{"longer than 2048", false, uri(long + "a")},
		{"CA", false, func(c *x509.Certificate) { c.IsCA = true }},
		{"CA that may sign", false, func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }},
		{"keyCertSign", false, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
		{"cRLSign", false, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }},
		{"no key usage", false, func(c *x509.Certificate) { c.KeyUsage = 0 }},
		{"no digitalSignature", false, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }},
		{"uncritical key usage", false, func(c *x509.Certificate) {
			c.KeyUsage = 0
			c.ExtraExtensions = []pkix.Extension{{Id: oidKeyUsage, Value: []byte{3, 2, 7, 0x80}}}
		}},
		{"no extended key usage", false, func(c *x509.Certificate) { c.ExtKeyUsage = nil }},
		{"server only", false, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }},
		{"client only", false, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }},
		{"any usage instead", false, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }},
		{"no subject, uncritical names", false, rawSAN(false, id.String())},
		{"names followed by garbage", false, func(c *x509.Certificate) {
			rawSAN(true, id.String())(c)
			c.ExtraExtensions[0].Value = append(c.ExtraExtensions[0].Value, 0)
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			tmpl := leafTemplate(id, nil, windowAt(time.Now(), time.Hour, nil))
			c.edit(tmpl)
			cert, err := signAny(tmpl, issuer.Chain[0], newKey(t), issuer.Key)
			if err == nil {
				_, err = CheckLeaf(cert)
			} else if c.ok {
				t.Fatal(err)
			}
			if c.ok && err != nil {
				t.Fatal(err)
			}
			// crypto/x509 may refuse what cannot even be parsed before we see it.
			if !c.ok && err == nil {
				t.Fatal("accepted")
			}
			if !c.ok && cert != nil && !errors.Is(err, ErrProfile) {
				t.Errorf("error %v does not match ErrProfile", err)
			}
		})
	}
}

func signAny(tmpl, issuer *x509.Certificate, key crypto.Signer, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func TestCheckCARefuses(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.test")
	cases := []struct {
		name string
		want error // nil: accepted
		edit func(*x509.Certificate)
	}{
		{"as made", nil, func(*x509.Certificate) {}},
		{"names nobody", nil, func(c *x509.Certificate) { c.URIs = nil }},
		{"other trust domain", ErrForeign, func(c *x509.Certificate) { c.URIs = []*url.URL{other.ID().URL()} }},
		{"with a path", ErrProfile, func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL(t, "spiffe://lab.test/ca")} }},
		{"two names", ErrProfile, func(c *x509.Certificate) { c.URIs = append(c.URIs, other.ID().URL()) }},
		{"leaf", ErrProfile, func(c *x509.Certificate) { c.IsCA, c.MaxPathLen, c.MaxPathLenZero = false, 0, false }},
		{"no basic constraints", ErrProfile, func(c *x509.Certificate) { c.BasicConstraintsValid = false }},
		{"no keyCertSign", ErrProfile, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p := mustCA(t, lab, 0, nil, c.edit)
			if err := CheckCA(p.Chain[0], lab); !errors.Is(err, c.want) {
				t.Errorf("CheckCA = %v, want %v", err, c.want)
			}
		})
	}
}

func TestCheckKey(t *testing.T) {
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p521, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	ed, _, _ := ed25519.GenerateKey(rand.Reader)
	modulus := func(bits uint) *big.Int { return new(big.Int).SetBit(big.NewInt(1), int(bits)-1, 1) }
	cases := []struct {
		name string
		ok   bool
		key  crypto.PublicKey
	}{
		{"P-256", true, p256.Public()},
		{"P-384", true, p384.Public()},
		{"Ed25519", true, ed},
		{"RSA 2048", true, &rsa.PublicKey{N: modulus(2048), E: 65537}},
		{"P-224", false, p224.Public()},
		{"P-521", false, p521.Public()},
		{"off the curve", false, &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}},
		{"short Ed25519", false, ed[:31]},
		{"RSA 1024", false, &rsa.PublicKey{N: modulus(1024), E: 65537}},
		{"RSA 16384", false, &rsa.PublicKey{N: modulus(16384), E: 65537}},
		{"RSA exponent 3", false, &rsa.PublicKey{N: modulus(2048), E: 3}},
		{"RSA even exponent", false, &rsa.PublicKey{N: modulus(2048), E: 65538}},
		{"RSA nothing", false, &rsa.PublicKey{}},
		{"nil P-256", false, (*ecdsa.PublicKey)(nil)},
		{"nothing", false, nil},
		{"by value", false, *p256},
	}
	for _, c := range cases {
		if err := CheckKey(c.key); (err == nil) != c.ok || (err != nil && !errors.Is(err, ErrRefused)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func FuzzCheckLeaf(f *testing.F) {
	issuer := mustCA(f, lab, 0, nil, nil)
	key := newKey(f)
	cert := mustSign(f, leafTemplate(spiffeid.RequireFromString("spiffe://lab.test/a"), nil, windowAt(time.Now(), time.Hour, nil)), &issuer, key)
	f.Add(cert.Raw)
	f.Add(issuer.Chain[0].Raw)
	f.Fuzz(func(t *testing.T, der []byte) {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		id, err := CheckLeaf(cert)
		if err != nil {
			return
		}
		// Whatever passes, the standard's own library reads as the same identity.
		if theirs, err := x509svid.IDFromCert(cert); err != nil || theirs != id || id.Path() == "" {
			t.Fatalf("CheckLeaf says %v, go-spiffe %v, %v", id, theirs, err)
		}
	})
}
