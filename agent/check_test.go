package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"ringfence.dev/agent/admin"
	"ringfence.dev/ca"
	"ringfence.dev/test/nettest"
)

// checking is an agent with one scope, and a host beside it.
func checking(t *testing.T) (a *Agent, far *nettest.NS) {
	t.Helper()
	a, _ = living(t, settingsIn(t, dir(t), ""))
	near, far := nettest.NetNS(t, "check"), nettest.NetNS(t, "checkfar")
	nettest.VethPair(t, near, far, "192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "2001:db8::2/64")
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: near.Path}); err != nil {
		t.Fatal(err)
	}
	return a, far
}

// wantFailure says at which step a check must stop, and with which fix.
func wantFailure(t *testing.T, a *Agent, peer, step, fix string) {
	t.Helper()
	r := report(t, a, peer)
	last := r.Steps[len(r.Steps)-1]
	if r.OK || last.OK || last.Name != step || !strings.Contains(last.Fix, fix) || last.Detail == "" {
		t.Errorf("%s: ended with %+v, want step %q and fix %q", peer, last, step, fix)
	}
	for _, s := range r.Steps[:len(r.Steps)-1] {
		if !s.OK || s.Fix != "" {
			t.Errorf("went on after %+v", s)
		}
	}
}

func report(t *testing.T, a *Agent, peer string) *admin.CheckReport {
	t.Helper()
	out, err := a.Check(t.Context(), "", peer)
	if err != nil {
		t.Fatal(err)
	}
	return out.(*admin.CheckReport)
}

// peerAgent answers on the tunnel's port as an agent would, or nearly.
func peerAgent(t *testing.T, far *nettest.NS, serve func(net.Conn)) {
	t.Helper()
	ln := far.Listen(t, "[::]:15008")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(10 * time.Second))
			serve(c)
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
}

// tlsServer shows cert, asks for ours, and then does what then says.
func tlsServer(cert *tls.Certificate, min uint16, then func(*tls.Conn)) func(net.Conn) {
	return func(c net.Conn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS12, MaxVersion: min,
			NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert})
		if s.Handshake() == nil && then != nil {
			then(s)
		}
	}
}

// answerPings is as much of HTTP/2 as a check needs.
func answerPings(c *tls.Conn) {
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(c, preface); err != nil {
		return
	}
	fr := http2.NewFramer(c, c)
	if fr.WriteSettings() != nil {
		return
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return
		}
		if p, ok := f.(*http2.PingFrame); ok && !p.IsAck() {
			// Noise first: only the right answer counts.
			if errors.Join(fr.WritePing(true, [8]byte{1}), fr.WritePing(false, p.Data), fr.WritePing(true, p.Data)) != nil {
				return
			}
		}
	}
}

func TestCheckSucceeds(t *testing.T) {
	a, far := checking(t)
	cert, err := a.svids.Certificate(t.Context(), a.nodeIdentity().ID)
	if err != nil {
		t.Fatal(err)
	}
	peerAgent(t, far, tlsServer(cert, tls.VersionTLS13, answerPings))
	for _, peer := range []string{"192.0.2.2", "2001:db8::2", "[2001:db8::2]", "::ffff:192.0.2.2"} {
		r := report(t, a, peer)
		var names []string
		for _, s := range r.Steps {
			names = append(names, s.Name)
		}
		if got := strings.Join(names, ", "); !r.OK || r.Scope != "web" || got != "name, reachability, own svid, tls, clock, trust bundle and svid, tunnel" {
			t.Errorf("%s: %+v", peer, r)
		}
		if id := r.Steps[5].Detail; id != a.nodeIdentity().ID.String() {
			t.Errorf("the peer is said to be %q", id)
		}
	}
}

func TestCheckRefusesNonsense(t *testing.T) {
	a, _ := checking(t)
	if _, err := a.Check(t.Context(), "nope", "192.0.2.2"); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("unknown scope: %v", err)
	}
	if _, err := a.Check(t.Context(), "", ""); !isBadRequest(err) {
		t.Errorf("no peer: %v", err)
	}
	for _, peer := range []string{"0.0.0.0", "::", "224.0.0.1", "fe80::2%lo", "no-such-host.invalid", "a b", "192.0.2.2:15008"} {
		wantFailure(t, a, peer, "name", "give an IP address")
	}
	empty, _ := living(t, settingsIn(t, dir(t), ""))
	if _, err := empty.Check(t.Context(), "", "192.0.2.2"); !isBadRequest(err) {
		t.Errorf("an agent without scopes: %v", err)
	}
}

func TestCheckReachability(t *testing.T) {
	a, far := checking(t)
	wantFailure(t, a, "192.0.2.2", "reachability", "no agent listens on 192.0.2.2")
	wantFailure(t, a, "198.51.100.1", "reachability", "routes")
	// A peer that packets vanish on the way to.
	far.Exec(t, "ip", "route", "add", "blackhole", "192.0.2.1/32")
	wantFailure(t, a, "192.0.2.2", "reachability", "a firewall drops TCP 15008 to 192.0.2.2")
}

func TestCheckTLS(t *testing.T) {
	a, far := checking(t)
	cert, err := a.svids.Certificate(t.Context(), a.nodeIdentity().ID)
	if err != nil {
		t.Fatal(err)
	}
	how := make(chan func(net.Conn), 1)
	peerAgent(t, far, func(c net.Conn) { (<-how)(c) })

	how <- func(c net.Conn) { io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n") }
	wantFailure(t, a, "192.0.2.2", "tls", "not an agent's")
	how <- func(net.Conn) {}
	wantFailure(t, a, "192.0.2.2", "tls", "not an agent's")
	how <- tlsServer(cert, tls.VersionTLS12, nil)
	wantFailure(t, a, "192.0.2.2", "tls", "too old")
}

func TestCheckTrust(t *testing.T) {
	a, far := checking(t)
	how := make(chan func(net.Conn), 1)
	peerAgent(t, far, func(c net.Conn) { (<-how)(c) })

	// Another trust domain with an authority of its own, as a host has that nobody joined.
	foreign := authorityIn(t, "test.example")
	how <- tlsServer(issued(t, foreign), tls.VersionTLS13, answerPings)
	wantFailure(t, a, "192.0.2.2", "trust bundle and svid", "do not share a trust domain")
	other := authorityIn(t, "other.example")
	how <- tlsServer(issued(t, other), tls.VersionTLS13, answerPings)
	wantFailure(t, a, "192.0.2.2", "trust bundle and svid", "do not share a trust domain")
	how <- tlsServer(selfSigned(t), tls.VersionTLS13, answerPings)
	wantFailure(t, a, "192.0.2.2", "trust bundle and svid", "do not share a trust domain")
}

func TestCheckClock(t *testing.T) {
	a, far := checking(t)
	how := make(chan func(net.Conn), 1)
	peerAgent(t, far, func(c net.Conn) { (<-how)(c) })
	how <- tlsServer(expired(t, a), tls.VersionTLS13, answerPings)
	wantFailure(t, a, "192.0.2.2", "clock", "set both clocks")
}

// A peer that refuses us does so after our side of TLS 1.3 is done.
func TestCheckTunnel(t *testing.T) {
	a, far := checking(t)
	cert, err := a.svids.Certificate(t.Context(), a.nodeIdentity().ID)
	if err != nil {
		t.Fatal(err)
	}
	how := make(chan func(net.Conn), 1)
	peerAgent(t, far, func(c net.Conn) { (<-how)(c) })
	how <- func(c net.Conn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
			ClientAuth: tls.RequireAnyClientCert, VerifyConnection: func(tls.ConnectionState) error { return errors.New("not you") }})
		s.Handshake()
	}
	wantFailure(t, a, "192.0.2.2", "tunnel", "refuses our certificate")
	how <- tlsServer(cert, tls.VersionTLS13, func(c *tls.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nthis is no HTTP/2 at all") })
	wantFailure(t, a, "192.0.2.2", "tunnel", "look at its log")
}

// Without names the scope that has listeners is looked from.
func TestCheckScope(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	for _, c := range []struct{ name, mode string }{{"a", "watch"}, {"c", "dry-run"}, {"b", "watch"}} {
		if err := addJSON(t, a, ScopeConfig{Name: c.name, NetNS: nettest.NetNS(t, c.name).Path, Mode: c.mode}); err != nil {
			t.Fatal(err)
		}
	}
	for ask, want := range map[string]string{"": "c", "b": "b"} {
		if sc, err := a.scopeForCheck(ask); err != nil || sc.settings.Name != want {
			t.Errorf("%q: %v, %v", ask, sc, err)
		}
	}
}

func authorityIn(t *testing.T, domain string) *ca.Authority {
	t.Helper()
	path := t.TempDir() + "/ca"
	if _, err := ca.Init(path, mustDomain(t, domain), ca.Options{}); err != nil {
		t.Fatal(err)
	}
	authority, err := ca.Open(path, ca.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return authority
}

func issued(t *testing.T, by *ca.Authority) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := by.Issue(context.Background(), mustID(t, by.TrustDomain(), "/ns/far/sa/ringfence"), key.Public(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: raw(chain), PrivateKey: key}
}

func raw(chain []*x509.Certificate) (der [][]byte) {
	for _, c := range chain {
		der = append(der, c.Raw)
	}
	return der
}

func selfSigned(t *testing.T) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{{Scheme: "spiffe", Host: "test.example", Path: "/ns/far/sa/ringfence"}}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// expired is a certificate of the agent's own authority that ran out an hour ago,
// made with the key that the authority keeps.
func expired(t *testing.T, a *Agent) *tls.Certificate {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(a.settings.StateDir, "ca", "intermediate.pem"))
	if err != nil {
		t.Fatal(err)
	}
	var signer any
	var issuer *x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if strings.Contains(block.Type, "PRIVATE KEY") {
			signer, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		} else if issuer == nil {
			issuer, err = x509.ParseCertificate(block.Bytes)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := a.nodeIdentity().ID
	leaf := &x509.Certificate{SerialNumber: big.NewInt(9), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{id.URL()}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, issuer, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, issuer.Raw}, PrivateKey: key}
}
