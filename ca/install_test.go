package ca

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"ringfence.dev/ca/keystore"
	"ringfence.dev/ca/keystore/keystoretest"
)

func nodeDir(t testing.TB) string {
	return filepath.Join(t.TempDir(), "node")
}

func mustIntermediate(t testing.TB, dir, node string, opts Options) []byte {
	t.Helper()
	data, err := NewIntermediate(dir, node, opts)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func mustInstall(t testing.TB, dir string, data []byte) {
	t.Helper()
	if err := InstallIntermediate(dir, data, Options{}); err != nil {
		t.Fatal(err)
	}
}

// TestTwoHosts is what an operator does: make the CA here, copy an intermediate
// there. Each end must accept what the other issues.
func TestTwoHosts(t *testing.T) {
	here, there := newCADir(t, Options{}), nodeDir(t)
	mustInstall(t, there, mustIntermediate(t, here, "b", Options{}))
	a, b := mustOpen(t, here, Options{}), mustOpen(t, there, Options{})
	if b.TrustDomain() != lab || b.Status().RootHere || !a.Status().RootHere {
		t.Errorf("node's status %+v", b.Status())
	}
	for _, c := range []struct{ from, to *Authority }{{a, b}, {b, a}} {
		chain := mustIssue(t, c.from, "spiffe://lab.test/ns/b/sa/web", 0)
		if _, _, err := x509svid.Verify(chain, c.to); err != nil {
			t.Error(err)
		}
	}
	if got := b.Status().NotAfter.Sub(time.Now()); got < MaxIntermediateTTL-time.Hour {
		t.Errorf("the node's intermediate ends in %v", got)
	}
	if cn := b.state.Load().intermediate.Chain[0].Subject.CommonName; cn != "b" {
		t.Errorf("intermediate of %q, want b", cn)
	}
	if _, err := NewIntermediate(there, "c", Options{}); !errors.Is(err, ErrNoRoot) {
		t.Errorf("a node made an intermediate: %v", err)
	}
	// The agent calls Init at every start, also there.
	before := snapshot(t, there)
	if created, err := Init(there, lab, Options{}); created || err != nil {
		t.Errorf("Init on the node = %v, %v", created, err)
	}
	mustInstall(t, there, []byte(before[intermediateFile])) // the same again
	wantUnchanged(t, there, before)
}

func TestNodeNames(t *testing.T) {
	dir := newCADir(t, Options{})
	for _, name := range []string{"", "a b", "a/b", "é", "a\n", strings.Repeat("a", 64)} {
		if _, err := NewIntermediate(dir, name, Options{}); !errors.Is(err, ErrRefused) {
			t.Errorf("node %q: %v", name, err)
		}
	}
	mustIntermediate(t, dir, strings.Repeat("a", 63), Options{})
}

func TestInstallIntermediateRefuses(t *testing.T) {
	here := newCADir(t, Options{})
	good := mustIntermediate(t, here, "b", Options{})
	other := spiffeid.RequireTrustDomainFromString("other.test")
	root := mustCA(t, lab, 1, nil, nil)
	foreign := mustCA(t, other, 1, nil, nil)
	leafKey := newKey(t)
	leaf := keystore.Pair{Key: leafKey, Chain: append(root.Chain[:0:0],
		mustSign(t, leafTemplate(spiffeid.RequireFromPath(lab, "/a"), nil, windowAt(time.Now(), time.Hour, nil)), &root, leafKey), root.Chain[0])}
	with := func(p keystore.Pair, more ...keystore.Pair) []byte {
		for _, m := range more {
			p.Chain = append(p.Chain, m.Chain...)
		}
		return mustPEM(t, p)
	}
	nameless := mustCA(t, lab, 1, nil, func(c *certTemplate) { c.URIs = nil })
	cases := []struct {
		name string
		data []byte
		want error
		hint string
	}{
		{"nothing", nil, ErrRefused, "no private key"},
		{"text", []byte("hello"), ErrRefused, ""},
		{"cut off", good[:len(good)/2], ErrRefused, ""},
		{"a root", with(root), ErrRefused, "root's key"},
		{"a leaf", with(leaf), ErrProfile, "of a CA must not have a path"},
		{"without its root", with(mustCA(t, lab, 0, &root, nil)), ErrConflict, "bundle"},
		{"with another root", with(mustCA(t, lab, 0, &root, nil), mustCA(t, lab, 1, nil, nil)), ErrConflict, "bundle"},
		{"under a foreign root", with(mustCA(t, lab, 0, &foreign, nil), foreign), ErrForeign, "other.test"},
		{"foreign under our root", with(mustCA(t, other, 0, &root, nil), root), ErrForeign, ""},
		{"ended", with(mustCA(t, lab, 0, &root, func(c *certTemplate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}), root), ErrExpired, "ringfence ca intermediate"},
		{"not begun", with(mustCA(t, lab, 0, &root, func(c *certTemplate) { c.NotBefore = time.Now().Add(time.Hour) }), root), ErrClock, ""},
		{"names no trust domain", with(mustCA(t, lab, 0, &nameless, func(c *certTemplate) { c.URIs = nil }), nameless), ErrRefused, "--trust-domain"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := nodeDir(t)
			err := InstallIntermediate(dir, c.data, Options{})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.hint) {
				t.Errorf("InstallIntermediate = %v, want %v and %q", err, c.want, c.hint)
			}
			if _, err := Open(dir, Options{}); !errors.Is(err, ErrNoCA) {
				t.Errorf("Open after that = %v", err)
			}
		})
	}
	t.Run("over a CA of its own", func(t *testing.T) {
		dir := newCADir(t, Options{})
		before := snapshot(t, dir)
		if err := InstallIntermediate(dir, good, Options{}); !errors.Is(err, ErrConflict) {
			t.Errorf("InstallIntermediate = %v, want ErrConflict", err)
		}
		wantUnchanged(t, dir, before)
	})
	t.Run("over one of another CA", func(t *testing.T) {
		dir := nodeDir(t)
		mustInstall(t, dir, good)
		before := snapshot(t, dir)
		stranger := mustIntermediate(t, newCADir(t, Options{}), "b", Options{})
		if err := InstallIntermediate(dir, stranger, Options{}); !errors.Is(err, ErrConflict) {
			t.Errorf("InstallIntermediate = %v, want ErrConflict: a file must not extend trust", err)
		}
		wantUnchanged(t, dir, before)
	})
}

// A foreign CA's certificates often name no trust domain; its chain may be longer.
func TestInstallFromElsewhere(t *testing.T) {
	noName := func(c *certTemplate) { c.URIs = nil }
	root := mustCA(t, lab, 2, nil, noName)
	upper := mustCA(t, lab, 1, &root, noName)
	lower := mustCA(t, lab, 0, &upper, noName)
	lower.Chain = append(lower.Chain, upper.Chain[0], root.Chain[0])
	dir := nodeDir(t)
	if err := InstallIntermediate(dir, mustPEM(t, lower), Options{TrustDomain: lab}); err != nil {
		t.Fatal(err)
	}
	a := mustOpen(t, dir, Options{})
	chain := mustIssue(t, a, "spiffe://lab.test/a", 0)
	if len(chain) != 3 {
		t.Errorf("chain of %d, want leaf and two intermediates", len(chain))
	}
	if _, _, err := x509svid.Verify(chain, a); err != nil {
		t.Error(err)
	}
}

func TestInstallReplacesAnOlderIntermediate(t *testing.T) {
	here, there := newCADir(t, Options{}), nodeDir(t)
	mustInstall(t, there, mustIntermediate(t, here, "b", Options{}))
	b := mustOpen(t, there, Options{})
	old := b.Status().Serial
	mustInstall(t, there, mustIntermediate(t, here, "b", Options{}))
	if err := b.Reload(); err != nil {
		t.Fatal(err)
	}
	if b.Status().Serial == old {
		t.Error("the old intermediate is still in use")
	}
	if got := len(b.Status().Roots); got != 1 {
		t.Errorf("%d roots", got)
	}
}

func TestInstallSurvivesEveryFault(t *testing.T) {
	here := newCADir(t, Options{})
	data := mustIntermediate(t, here, "b", Options{})
	for _, fault := range []keystoretest.Fault{keystoretest.Lose, keystoretest.Refuse, keystoretest.Deny} {
		for step, reached := 0, true; reached; step++ {
			t.Run(fmt.Sprintf("fault%d/step%d", fault, step), func(t *testing.T) {
				reached = false
				dir := nodeDir(t)
				fs := &keystoretest.FS{At: func(n int, _, _ string) keystoretest.Fault {
					if n != step {
						return keystoretest.Pass
					}
					reached = true
					return fault
				}}
				_ = InstallIntermediate(dir, data, Options{fs: fs})
				if a, err := Open(dir, Options{}); err == nil {
					mustIssue(t, a, "spiffe://lab.test/a", 0)
				}
				mustInstall(t, dir, data)
				mustIssue(t, mustOpen(t, dir, Options{}), "spiffe://lab.test/a", 0)
			})
		}
	}
}

func TestBundles(t *testing.T) {
	one, two := newCADir(t, Options{}), newCADir(t, Options{})
	theirs, err := Bundle(two)
	if err != nil {
		t.Fatal(err)
	}
	data, err := theirs.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	a := mustOpen(t, one, Options{})
	before, _ := a.GetX509BundleForTrustDomain(lab)
	if added, err := InstallBundle(one, data, Options{}); added != 1 || err != nil {
		t.Fatalf("InstallBundle = %d, %v", added, err)
	}
	if err := a.Reload(); err != nil {
		t.Fatal(err)
	}
	after, _ := a.GetX509BundleForTrustDomain(lab)
	if after == before || len(after.X509Authorities()) != 2 || len(before.X509Authorities()) != 1 {
		t.Error("a changed bundle must be another pointer with both roots")
	}
	if s := a.Status(); s.Sequence != 2 || len(s.Roots) != 2 {
		t.Errorf("status %+v, want sequence 2 and two roots", s)
	}
	// Now one accepts what two issues, and its own still.
	for _, dir := range []string{one, two} {
		if _, _, err := x509svid.Verify(mustIssue(t, mustOpen(t, dir, Options{}), "spiffe://lab.test/a", 0), a); err != nil {
			t.Error(err)
		}
	}
	// The same again, as PEM: nothing new, the same pointer.
	pem := keystore.EncodeCertificates(theirs.X509Authorities())
	if added, err := InstallBundle(one, pem, Options{}); added != 0 || err != nil {
		t.Fatalf("second InstallBundle = %d, %v", added, err)
	}
	if err := a.Reload(); err != nil {
		t.Fatal(err)
	}
	if again, _ := a.GetX509BundleForTrustDomain(lab); again != after || a.Status().Sequence != 2 {
		t.Error("an unchanged bundle must stay the same pointer")
	}
	if _, err := a.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other.test")); !errors.Is(err, ErrForeign) {
		t.Errorf("bundle of a stranger: %v", err)
	}
}

func TestBundleFileIsTheStandardsFormat(t *testing.T) {
	dir := newCADir(t, Options{})
	b, err := spiffebundle.Load(lab, filepath.Join(dir, bundleFile))
	if err != nil {
		t.Fatal(err)
	}
	if seq, ok := b.SequenceNumber(); !ok || seq != 1 {
		t.Errorf("spiffe_sequence %d %v", seq, ok)
	}
	if hint, ok := b.RefreshHint(); !ok || hint != 5*time.Minute {
		t.Errorf("spiffe_refresh_hint %v %v", hint, ok)
	}
	data, err := os.ReadFile(filepath.Join(dir, bundleFile))
	if err != nil {
		t.Fatal(err)
	}
	if text := string(data); !strings.Contains(text, `"use":"x509-svid"`) || strings.Contains(text, `"kid"`) {
		t.Errorf("x509-svid entries must have no kid: %s", text)
	}
}

func TestInstallBundleRefuses(t *testing.T) {
	root := mustCA(t, lab, 1, nil, nil)
	foreign := mustCA(t, spiffeid.RequireTrustDomainFromString("other.test"), 1, nil, nil)
	nameless := mustCA(t, lab, 1, nil, func(c *certTemplate) { c.URIs = nil })
	leafKey := newKey(t)
	leaf := mustSign(t, leafTemplate(spiffeid.RequireFromPath(lab, "/a"), nil, windowAt(time.Now(), time.Hour, nil)), &root, leafKey)
	cases := []struct {
		name string
		data []byte
		want error
	}{
		{"nothing", nil, ErrRefused},
		{"text", []byte("hello"), ErrRefused},
		{"JSON of another kind", []byte(`{"a":1}`), ErrRefused},
		{"no keys", []byte(`{"keys":[]}`), ErrRefused},
		{"a private key", mustPEM(t, root), ErrRefused},
		{"a leaf", keystore.EncodeCertificates(append(root.Chain[:1:1], leaf)), ErrProfile},
		{"two trust domains", keystore.EncodeCertificates(append(root.Chain[:1:1], foreign.Chain...)), ErrForeign},
	}
	for _, c := range cases {
		dir := nodeDir(t)
		if _, err := InstallBundle(dir, c.data, Options{}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if _, err := os.Stat(filepath.Join(dir, bundleFile)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: left a bundle behind", c.name)
		}
	}
	own := newCADir(t, Options{})
	before := snapshot(t, own)
	if _, err := InstallBundle(own, keystore.EncodeCertificates(foreign.Chain), Options{}); !errors.Is(err, ErrForeign) {
		t.Errorf("foreign root beside our own: %v", err)
	}
	wantUnchanged(t, own, before)
	fresh := nodeDir(t)
	data := keystore.EncodeCertificates(nameless.Chain)
	if _, err := InstallBundle(fresh, data, Options{}); !errors.Is(err, ErrRefused) {
		t.Errorf("nameless root in an empty directory: %v", err)
	}
	if added, err := InstallBundle(fresh, data, Options{TrustDomain: lab}); added != 1 || err != nil {
		t.Errorf("with the trust domain said: %d, %v", added, err)
	}
	if _, err := Init(fresh, lab, Options{}); !errors.Is(err, ErrConflict) {
		t.Errorf("Init over an installed bundle: %v, want ErrConflict", err)
	}
}

func TestInstalledIntermediateEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepTo2030()
		here, there := newCADir(t, Options{}), nodeDir(t)
		mustInstall(t, there, mustIntermediate(t, here, "b", Options{IntermediateTTL: 24 * time.Hour}))
		b := mustOpen(t, there, Options{})
		time.Sleep(23*time.Hour + 30*time.Minute)
		chain := mustIssue(t, b, "spiffe://lab.test/a", 0) // due, but no root: the old one still signs
		if !chain[0].NotAfter.Equal(chain[1].NotAfter) {
			t.Errorf("leaf ends %v, issuer %v", chain[0].NotAfter, chain[1].NotAfter)
		}
		time.Sleep(30 * time.Minute)
		_, err := b.Issue(t.Context(), spiffeid.RequireFromString("spiffe://lab.test/a"), newKey(t).Public(), 0)
		if !errors.Is(err, ErrExpired) || !strings.Contains(err.Error(), "ringfence ca intermediate") {
			t.Errorf("Issue = %v, want ErrExpired with advice", err)
		}
		if _, err := Open(there, Options{}); err != nil {
			t.Errorf("an expired CA must open, so that status can tell: %v", err)
		}
	})
}
