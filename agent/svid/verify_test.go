package svid

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca"
)

func newVerifier(t testing.TB, src x509bundle.Source) *Store {
	t.Helper()
	s, err := New(Config{Issuer: newIssuer(t), Bundles: src})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestVerify(t *testing.T) {
	root := newCA(t, lab, nil, nil)
	inter := newCA(t, lab, root, nil)
	strangerRoot := newCA(t, other, nil, nil)
	rogue := newCA(t, lab, nil, nil) // says it is ours
	otherID := spiffeid.RequireFromPath(other, "/ns/b/sa/web")
	// The peer's trust domain is federated: its bundle counts for it alone.
	s := newVerifier(t, x509bundle.NewSet(bundleOf(lab, root), bundleOf(other, strangerRoot)))

	noEKU := func(c *x509.Certificate) { c.ExtKeyUsage = nil }
	old := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	}
	oldCA := newCA(t, lab, root, old)
	foreignInter := newCA(t, other, root, nil)                                  // says it is of another domain, under our root
	crossed := newCA(t, lab, strangerRoot, nil)                                 // says it is ours, under theirs
	nameless := newCA(t, lab, root, func(c *x509.Certificate) { c.URIs = nil }) // as many CAs are
	mail := newCA(t, lab, root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} })
	noCA := newCA(t, lab, root, func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature })
	noSign := newCA(t, lab, root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })
	last := newCA(t, lab, root, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	beyond := newCA(t, lab, last, nil)
	named := newCA(t, lab, root, func(c *x509.Certificate) {
		c.PermittedURIDomains = []string{"elsewhere.test"}
		c.PermittedDNSDomainsCritical = true
	})
	leaf := func(a *authority, id spiffeid.ID, edit func(*x509.Certificate)) *x509.Certificate {
		return a.mustLeaf(t, id, edit)
	}
	good := leaf(inter, web, nil)
	forged := append([]byte(nil), good.Raw...)
	forged[len(forged)-1] ^= 1
	self := newKey(t)
	selfTmpl := *good
	selfTmpl.PublicKey = self.Public()
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weakLeaf, err := inter.leaf(weak.Public(), web, nil)
	if err != nil {
		t.Fatal(err)
	}

	cases := []struct {
		name  string
		chain [][]byte
		id    spiffeid.ID
		want  error
	}{
		{"through an intermediate", der(good, inter.chain[0]), web, nil},
		{"the root sent too", der(leaf(inter, web, nil), inter.chain[0], root.chain[0]), web, nil},
		{"right under the root", der(leaf(root, web, nil)), web, nil},
		{"an intermediate that names nobody", der(leaf(nameless, web, nil), nameless.chain[0]), web, nil},
		{"federated", der(leaf(strangerRoot, otherID, nil)), otherID, nil},
		{"useless certificates beside", der(leaf(inter, web, nil), rogue.chain[0], inter.chain[0]), web, nil},

		{"nothing", nil, web, ca.ErrProfile},
		{"an empty certificate", [][]byte{{}}, web, ca.ErrProfile},
		{"garbage", [][]byte{[]byte("hello")}, web, ca.ErrProfile},
		{"garbage after the leaf", [][]byte{leaf(inter, web, nil).Raw, []byte("hello")}, web, ca.ErrProfile},
		{"too many", der(good, good, good, good, good, good, good, good, good), web, ca.ErrProfile},
		{"forged", [][]byte{forged, inter.chain[0].Raw}, web, ErrUntrusted},
		{"without its intermediate", der(leaf(inter, web, nil)), web, ErrUntrusted},
		{"wrong order", der(inter.chain[0], good), web, ca.ErrProfile},
		{"self-signed", der(mustSign(t, &selfTmpl, &selfTmpl, self.Public(), self)), web, ErrUntrusted},
		{"a root of our name", der(leaf(rogue, web, nil), rogue.chain[0]), web, ErrUntrusted},
		{"our ID from their root", der(leaf(strangerRoot, web, nil), strangerRoot.chain[0]), web, ErrUntrusted},
		{"their ID from our root", der(leaf(root, otherID, nil)), web, ErrUntrusted},
		{"their intermediate, unconstrained, for our ID", der(leaf(crossed, web, nil), crossed.chain[0]), web, ErrUntrusted},
		{"an intermediate of their name under our root", der(leaf(foreignInter, web, nil), foreignInter.chain[0]), web, ErrUntrusted},
		{"unknown trust domain", der(leaf(root, spiffeid.RequireFromString("spiffe://nowhere.test/a"), nil)), web, ErrForeign},
		{"expired", der(leaf(inter, web, old), inter.chain[0]), web, ErrTime},
		{"not begun", der(leaf(inter, web, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), inter.chain[0]), web, ErrTime},
		{"expired intermediate", der(leaf(oldCA, web, nil), oldCA.chain[0]), web, ErrUntrusted},
		{"a CA as leaf", der(leaf(inter, web, func(c *x509.Certificate) { c.IsCA = true }), inter.chain[0]), web, ca.ErrProfile},
		{"the intermediate itself", der(inter.chain[0]), web, ca.ErrProfile},
		{"no EKU", der(leaf(inter, web, noEKU), inter.chain[0]), web, ca.ErrProfile},
		{"no URI", der(leaf(inter, web, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"web.lab.test"} }), inter.chain[0]), web, ca.ErrProfile},
		{"two URIs", der(leaf(inter, web, func(c *x509.Certificate) { c.URIs = append(c.URIs, otherID.URL()) }), inter.chain[0]), web, ca.ErrProfile},
		{"no path", der(leaf(inter, web, func(c *x509.Certificate) { c.URIs = []*url.URL{lab.ID().URL()} }), inter.chain[0]), web, ca.ErrProfile},
		{"weak key", der(weakLeaf, inter.chain[0]), web, ca.ErrProfile},
		{"signed by a leaf", der(leaf(noCA, web, nil), noCA.chain[0]), web, ErrUntrusted},
		{"signed without keyCertSign", der(leaf(noSign, web, nil), noSign.chain[0]), web, ErrUntrusted},
		{"an intermediate for mail", der(leaf(mail, web, nil), mail.chain[0]), web, ErrUntrusted},
		{"beyond the path length", der(leaf(beyond, web, nil), beyond.chain[0], last.chain[0]), web, ErrUntrusted},
		{"outside the name constraint", der(leaf(named, web, nil), named.chain[0]), web, ErrUntrusted},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for range 2 { // the second time from memory, if it passed
				id, err := s.Verify(c.chain)
				if !errors.Is(err, c.want) {
					t.Fatalf("Verify = %v, want %v", err, c.want)
				}
				if want := c.id; err == nil && id != want || err != nil && !id.IsZero() {
					t.Errorf("Verify gave %q", id)
				}
			}
		})
	}
	if n := len(s.verifier.verdicts); n != 6 {
		t.Errorf("%d verdicts kept, want those of the 6 that passed", n)
	}
}

func TestSkew(t *testing.T) {
	cases := []struct {
		skew           time.Duration
		before, behind time.Duration // of the leaf's begin and end
		ok             bool
	}{
		{0, time.Second, 0, true}, {0, 29 * time.Second, 0, true}, {0, 31 * time.Second, 0, false},
		{0, 0, 29 * time.Second, true}, {0, 0, 31 * time.Second, false},
		{-1, time.Second, 0, false}, {-1, 0, time.Second, false},
		{time.Minute, 59 * time.Second, 0, true}, {time.Minute, 0, 61 * time.Second, false},
	}
	for _, c := range cases {
		synctest.Test(t, func(t *testing.T) {
			root := newCA(t, lab, nil, nil)
			leaf := root.mustLeaf(t, web, func(x *x509.Certificate) {
				if c.before > 0 {
					x.NotBefore = time.Now().Add(c.before)
				} else {
					x.NotAfter = time.Now().Add(-c.behind)
				}
			})
			s, err := New(Config{Issuer: newIssuer(t), Bundles: bundleOf(lab, root), Skew: c.skew})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if _, err := s.Verify(der(leaf)); (err == nil) != c.ok || (err != nil && !errors.Is(err, ErrTime)) {
				t.Errorf("%+v: %v", c, err)
			}
		})
	}
}

// A verdict ends with the leaf, with the issuer, and with the bundle.
func TestVerdictsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newCA(t, lab, nil, nil)
		bundle := bundleOf(lab, root)
		s := newVerifier(t, bundle)
		short := der(root.mustLeaf(t, web, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(20 * time.Second) }))
		if _, err := s.Verify(short); err != nil {
			t.Fatal(err)
		}
		time.Sleep(51 * time.Second) // its life and the skew
		if _, err := s.Verify(short); !errors.Is(err, ErrTime) {
			t.Errorf("after the leaf's end: %v", err)
		}
		brief := newCA(t, lab, root, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(20 * time.Second) })
		under := der(brief.mustLeaf(t, web, nil), brief.chain[0])
		if _, err := s.Verify(under); err != nil {
			t.Fatal(err)
		}
		time.Sleep(21 * time.Second)
		if _, err := s.Verify(under); !errors.Is(err, ErrUntrusted) {
			t.Errorf("after the issuer's end: %v", err)
		}
		long := der(root.mustLeaf(t, web, nil))
		if _, err := s.Verify(long); err != nil {
			t.Fatal(err)
		}
		bundle.SetX509Authorities(newCA(t, lab, nil, nil).chain)
		if _, err := s.Verify(long); !errors.Is(err, ErrUntrusted) {
			t.Errorf("after its root was taken out of the bundle: %v", err)
		}
		bundle.SetX509Authorities(nil)
		if _, err := s.Verify(long); !errors.Is(err, ErrUntrusted) {
			t.Errorf("with an empty bundle: %v", err)
		}
		bundle.AddX509Authority(root.chain[0])
		if _, err := s.Verify(long); err != nil {
			t.Errorf("with the root back: %v", err)
		}
	})
}

type lyingSource struct{ *x509bundle.Bundle }

func (l lyingSource) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return l.Bundle, nil
}

func TestBundleOfAnotherDomainIsNotUsed(t *testing.T) {
	root := newCA(t, lab, nil, func(c *x509.Certificate) { c.URIs = nil })
	s := newVerifier(t, lyingSource{bundleOf(lab, root)})
	if _, err := s.Verify(der(root.mustLeaf(t, spiffeid.RequireFromPath(other, "/a"), nil))); !errors.Is(err, ErrForeign) {
		t.Errorf("Verify = %v, want ErrForeign", err)
	}
}

// A leaf put into a bundle by mistake is no authority, not even for itself.
func TestLeafInTheBundle(t *testing.T) {
	root := newCA(t, lab, nil, nil)
	leaf := root.mustLeaf(t, web, nil)
	bundle := bundleOf(lab)
	bundle.AddX509Authority(leaf)
	if _, err := newVerifier(t, bundle).Verify(der(leaf)); !errors.Is(err, ErrUntrusted) {
		t.Errorf("Verify = %v, want ErrUntrusted", err)
	}
}

func TestVerdictsAreBounded(t *testing.T) {
	s := newVerifier(t, bundleOf(lab, newCA(t, lab, nil, nil)))
	for n := range maxVerdicts + 100 {
		var sum [32]byte
		big.NewInt(int64(n)).FillBytes(sum[:])
		s.verifier.remember(sum, verdict{id: web})
	}
	if n := len(s.verifier.verdicts); n != maxVerdicts {
		t.Errorf("%d verdicts kept, want %d", n, maxVerdicts)
	}
}

func FuzzVerify(f *testing.F) {
	root := newCA(f, lab, nil, nil)
	leaf := root.mustLeaf(f, web, nil)
	s := newVerifier(f, bundleOf(lab, root))
	f.Add(leaf.Raw, root.chain[0].Raw)
	f.Add(root.chain[0].Raw, leaf.Raw)
	f.Fuzz(func(t *testing.T, a, b []byte) {
		// Only what the root has signed may pass: the one leaf there is.
		if id, err := s.Verify([][]byte{a, b}); err == nil && (id != web || string(a) != string(leaf.Raw)) {
			t.Fatalf("accepted % x as %s", a, id)
		}
	})
}

func TestCertificateAllocatesNothing(t *testing.T) {
	s := newStore(t, newIssuer(t), nil)
	mustGet(t, s, web)
	ctx := t.Context()
	if n := testing.AllocsPerRun(1000, func() { s.Certificate(ctx, web) }); n != 0 {
		t.Errorf("%v allocations for a cached SVID", n)
	}
}

func BenchmarkCertificateCached(b *testing.B) {
	s := newStore(b, newIssuer(b), nil)
	mustGet(b, s, web)
	ctx := b.Context()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := s.Certificate(ctx, web); err != nil {
				b.Error(err)
			}
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	root := newCA(b, lab, nil, nil)
	inter := newCA(b, lab, root, nil)
	chain := der(inter.mustLeaf(b, web, nil), inter.chain[0])
	s := newVerifier(b, bundleOf(lab, root))
	run := func(b *testing.B, before func()) {
		b.ReportAllocs()
		for b.Loop() {
			before()
			if _, err := s.Verify(chain); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("first", func(b *testing.B) { run(b, func() { clear(s.verifier.verdicts) }) })
	b.Run("again", func(b *testing.B) { run(b, func() {}) })
}
