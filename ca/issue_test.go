package ca

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestIssueRefuses(t *testing.T) {
	a := newAuthority(t)
	good := newKey(t).Public()
	weak, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	id := spiffeid.RequireFromString("spiffe://lab.test/a")
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	cases := []struct {
		name string
		ctx  context.Context
		id   spiffeid.ID
		key  any
		ttl  time.Duration
		want error
	}{
		{"no ID", t.Context(), spiffeid.ID{}, good, 0, ErrRefused},
		{"foreign trust domain", t.Context(), spiffeid.RequireFromString("spiffe://other.test/a"), good, 0, ErrForeign},
		{"sub-domain", t.Context(), spiffeid.RequireFromString("spiffe://a.lab.test/a"), good, 0, ErrForeign},
		{"no path", t.Context(), lab.ID(), good, 0, ErrRefused},
		{"too long", t.Context(), spiffeid.RequireFromPath(lab, "/"+strings.Repeat("a", 2048)), good, 0, ErrRefused},
		{"weak key", t.Context(), id, weak.Public(), 0, ErrRefused},
		{"no key", t.Context(), id, nil, 0, ErrRefused},
		{"negative life", t.Context(), id, good, -1, ErrRefused},
		{"long life", t.Context(), id, good, MaxTTL + 1, ErrRefused},
		{"cancelled", cancelled, id, good, 0, context.Canceled},
	}
	for _, c := range cases {
		chain, err := a.Issue(c.ctx, c.id, c.key, c.ttl)
		if !errors.Is(err, c.want) || chain != nil {
			t.Errorf("%s: %v, %v; want %v", c.name, chain, err, c.want)
		}
	}
}

func TestIssueLife(t *testing.T) {
	a := newAuthority(t)
	for ask, want := range map[time.Duration]time.Duration{0: time.Hour, 20 * time.Second: 20 * time.Second, MaxTTL: MaxTTL} {
		before := time.Now()
		leaf := mustIssue(t, a, "spiffe://lab.test/a", ask)[0]
		if got := leaf.NotAfter.Sub(before); got < want-2*time.Second || got > want+2*time.Second {
			t.Errorf("asked for %v, ends in %v", ask, got)
		}
	}
}

func TestNeverPastTheIssuer(t *testing.T) {
	dir := newCADir(t, Options{IntermediateTTL: 30 * time.Minute})
	chain := mustIssue(t, mustOpen(t, dir, Options{}), "spiffe://lab.test/a", 0)
	if chain[0].NotAfter.After(chain[1].NotAfter) || chain[0].NotBefore.Before(chain[1].NotBefore) {
		t.Errorf("leaf %v to %v, issuer %v to %v", chain[0].NotBefore, chain[0].NotAfter, chain[1].NotBefore, chain[1].NotAfter)
	}
}

func csr(t testing.TB, edit func(*x509.CertificateRequest), key any) []byte {
	t.Helper()
	tmpl := &x509.CertificateRequest{URIs: []*url.URL{mustURL(t, "spiffe://lab.test/ns/b/sa/web")}}
	edit(tmpl)
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestIssueCSR(t *testing.T) {
	a := newAuthority(t)
	key := newKey(t)
	chain, err := a.IssueCSR(t.Context(), csr(t, func(*x509.CertificateRequest) {}, key), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if !key.PublicKey.Equal(chain[0].PublicKey) || chain[0].URIs[0].String() != "spiffe://lab.test/ns/b/sa/web" {
		t.Error("certificate of another key or ID")
	}
	// A name in the request's subject is not ours to repeat.
	chain, err = a.IssueCSR(t.Context(), csr(t, func(r *x509.CertificateRequest) { r.Subject.CommonName = "admin" }, key), 0)
	if err != nil || len(chain[0].RawSubject) != 2 {
		t.Errorf("subject of the request: %v, %v", chain[0].Subject, err)
	}
}

func TestIssueCSRRefuses(t *testing.T) {
	a := newAuthority(t)
	key := newKey(t)
	weak, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	u := func(s string) *url.URL { return mustURL(t, s) }
	good := csr(t, func(*x509.CertificateRequest) {}, key)
	forged := bytes.Replace(good, []byte("/sa/web"), []byte("/sa/wed"), 1)
	cases := map[string][]byte{
		"empty":          nil,
		"cut off":        good[:len(good)-1],
		"forged":         forged,
		"too long":       append(bytes.Clone(good), make([]byte, maxCSR)...),
		"weak key":       csr(t, func(*x509.CertificateRequest) {}, weak),
		"no name":        csr(t, func(r *x509.CertificateRequest) { r.URIs = nil }, key),
		"two names":      csr(t, func(r *x509.CertificateRequest) { r.URIs = append(r.URIs, u("spiffe://lab.test/b")) }, key),
		"DNS name too":   csr(t, func(r *x509.CertificateRequest) { r.DNSNames = []string{"db"} }, key),
		"address too":    csr(t, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{{192, 0, 2, 1}} }, key),
		"mail too":       csr(t, func(r *x509.CertificateRequest) { r.EmailAddresses = []string{"a@b"} }, key),
		"foreign domain": csr(t, func(r *x509.CertificateRequest) { r.URIs[0].Host = "other.test" }, key),
		"no path":        csr(t, func(r *x509.CertificateRequest) { r.URIs[0].Path = "" }, key),
		"malformed ID":   csr(t, func(r *x509.CertificateRequest) { r.URIs[0].Path = "/a//b" }, key),
		"https":          csr(t, func(r *x509.CertificateRequest) { r.URIs[0].Scheme = "https" }, key),
		"extra extension": csr(t, func(r *x509.CertificateRequest) {
			r.ExtraExtensions = []pkix.Extension{{Id: oidBasic, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}
		}, key),
	}
	for name, der := range cases {
		if chain, err := a.IssueCSR(t.Context(), der, 0); !errors.Is(err, ErrRefused) || chain != nil {
			t.Errorf("%s: %v, want ErrRefused", name, err)
		}
	}
}

func FuzzParseCSR(f *testing.F) {
	key := newKey(f)
	f.Add(csr(f, func(*x509.CertificateRequest) {}, key))
	f.Fuzz(func(t *testing.T, der []byte) {
		if id, req, err := ParseCSR(der); err == nil && (len(req.URIs) != 1 || id.String() != req.URIs[0].String()) {
			t.Fatalf("%v from %v", id, req.URIs)
		}
	})
}

func TestIssuanceLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "issued.jsonl")
	log, err := OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	dir := newCADir(t, Options{Record: log.Record})
	a := mustOpen(t, dir, Options{Record: log.Record})
	if _, err := NewIntermediate(dir, "b", Options{Record: log.Record}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { mustIssue(t, a, "spiffe://lab.test/ns/b/sa/web", 0) })
	}
	wg.Wait()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if info, _ := f.Stat(); info.Mode().Perm() != 0o600 {
		t.Errorf("log has mode %v", info.Mode())
	}
	kinds, serials := map[string]int{}, map[string]bool{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var i Issuance
		if err := json.Unmarshal(lines.Bytes(), &i); err != nil {
			t.Fatalf("%s: %v", lines.Bytes(), err)
		}
		kinds[i.Kind+" "+i.ID+" "+i.Node]++
		serials[i.Serial] = true
	}
	if kinds["svid spiffe://lab.test/ns/b/sa/web "] != 20 || kinds["intermediate spiffe://lab.test b"] != 1 || kinds["intermediate spiffe://lab.test "] != 1 {
		t.Errorf("logged %v", kinds)
	}
	if len(serials) != 22 {
		t.Errorf("%d different serials of 22", len(serials))
	}
}

func TestNothingIsIssuedUnrecorded(t *testing.T) {
	full := errors.New("disk full")
	a := mustOpen(t, newCADir(t, Options{}), Options{Record: func(Issuance) error { return full }})
	if chain, err := a.Issue(t.Context(), spiffeid.RequireFromString("spiffe://lab.test/a"), newKey(t).Public(), 0); !errors.Is(err, full) || chain != nil {
		t.Errorf("Issue = %v, %v", chain, err)
	}
	if _, err := NewIntermediate(a.dir.Path(), "b", Options{Record: func(Issuance) error { return full }}); !errors.Is(err, full) {
		t.Errorf("NewIntermediate = %v", err)
	}
}

func TestSerialsDoNotRepeat(t *testing.T) {
	seen := make(map[string]bool)
	for range 10_000 {
		s := newSerial()
		if s.Sign() <= 0 || len(s.Bytes()) != 20 || seen[s.String()] {
			t.Fatalf("serial %x", s)
		}
		seen[s.String()] = true
	}
}

func BenchmarkIssue(b *testing.B) {
	a := newAuthority(b)
	pub := newKey(b).Public()
	id := spiffeid.RequireFromString("spiffe://lab.test/ns/b/sa/web")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Issue(context.Background(), id, pub, 0); err != nil {
			b.Fatal(err)
		}
	}
}
