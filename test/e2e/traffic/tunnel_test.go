package traffic_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"ringfence.dev/cni/netns"
	"ringfence.dev/test/e2e/world"
	"ringfence.dev/tools/ringfence/lab"
)

// dialFrom dials from a host that has no agent.
func dialFrom(w *world.World, host, addr string) (c net.Conn, err error) {
	ns, err := netns.Open(w.NetNS(host))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	err = ns.Do(func() error {
		c, err = net.DialTimeout("tcp", addr, 5*time.Second)
		return err
	})
	if err == nil {
		err = c.SetDeadline(time.Now().Add(15 * time.Second))
	}
	return c, err
}

// hbone is a tunnel made by another implementation than ours: x/net's HTTP/2.
type hbone struct {
	w    *world.World
	addr string // of the agent
	cfg  *tls.Config
}

// connect opens a stream to an authority, with a status; a body is only there with status 200.
func (h hbone) connect(t *testing.T, authority string, fields ...string) (status int, in io.WriteCloser, out io.ReadCloser, err error) {
	t.Helper()
	tr := &http2.Transport{DialTLSContext: func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) {
		raw, err := dialFrom(h.w, "a", h.addr)
		if err != nil {
			return nil, err
		}
		c := tls.Client(raw, h.cfg)
		if err := c.HandshakeContext(ctx); err != nil {
			raw.Close()
			return nil, err
		}
		return c, nil
	}}
	t.Cleanup(tr.CloseIdleConnections)
	body, pipe := io.Pipe()
	t.Cleanup(func() { pipe.Close(); body.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	t.Cleanup(cancel)
	// A CONNECT has neither scheme nor path on the wire (RFC 9113 section 8.5); the URL is where to dial.
	req := (&http.Request{Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: h.addr}, Host: authority, Header: http.Header{}, Body: body}).WithContext(ctx)
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		req.Header.Set(name, value)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return 0, nil, nil, err
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp.StatusCode, pipe, resp.Body, nil
}

const strangersSeeHealth = `
@id("strangers-see-health")
permit (principal is Anonymous, action == Action::"GET", resource == Service::"spiffe://lab.test/ns/b/sa/web")
when { context.request.path == "/health" };
`

// Host a is the attacker's: it has no agent, and the test holds what keys it likes.
func TestTunnelEntrance(t *testing.T) {
	o := lab.Options{Agents: []string{"b"}, Policies: world.Policies(t, shopPolicy+strangersSeeHealth)}
	world.ForEach(t, o, func(t *testing.T, w *world.World) {
		web := w.Puppet("b", "web")
		web.Web("[::]:80")
		web.Echo("[::]:7000")
		s := &shopWorld{w, nil, web}
		t.Run("interoperates", func(t *testing.T) { interoperates(t, s) })
		t.Run("certificates", func(t *testing.T) { certificates(t, s) })
		t.Run("elsewhere", func(t *testing.T) { elsewhere(t, s) })
		t.Run("plain", func(t *testing.T) { plainOnTunnelPort(t, s) })
		t.Run("strangers", func(t *testing.T) { strangers(t, s) })
		for _, seen := range web.Seen() {
			if !strings.HasSuffix(seen, "/tunnelled") && !strings.HasSuffix(seen, "/health") {
				t.Errorf("the server was reached by %s", seen)
			}
		}
	})
}

func tunnelConfig(cert tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}
}

// What every refusal here is held against: another implementation with a good certificate is served.
func interoperates(t *testing.T, w *shopWorld) {
	root := readAuthority(t, filepath.Join(w.Dir(), "ca"))
	cert := root.leaf(t, idShop, nil)
	for _, ip := range world.Addresses {
		h := hbone{w.World, port(ip, "15008"), tunnelConfig(cert)}
		// It may claim what it likes about who it is: only the certificate counts.
		status, in, out, err := h.connect(t, port(ip, "80"), "forwarded: for=\"198.51.100.9:1\"", "x-forwarded-client-cert: URI=spiffe://lab.test/king", "baggage: king=1")
		if err != nil || status != 200 {
			t.Fatalf("%s: status %d, %v", ip, status, err)
		}
		if _, err := io.WriteString(in, request("/tunnelled")+request("/admin/x")); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(out)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != 200 || !strings.Contains(string(body), "URI="+idShop) || strings.Contains(string(body), "king") {
			t.Errorf("status %d: %s", resp.StatusCode, body)
		}
		if strings.Contains(string(body), "198.51.100.9") {
			t.Errorf("the client made up its address: %s", body)
		}
		if resp, err = http.ReadResponse(r, nil); err != nil || resp.StatusCode != 403 {
			t.Errorf("a path that policy refuses: %+v, %v", resp, err)
		}
		in.Close()
	}
}

func certificates(t *testing.T, w *shopWorld) {
	root := readAuthority(t, filepath.Join(w.Dir(), "ca"))
	twin, other := newAuthority(t, "lab.test"), newAuthority(t, "other.test")
	good := root.leaf(t, idShop, nil)
	second, _ := url.Parse("spiffe://lab.test/ns/a/sa/second")
	for name, cfg := range map[string]*tls.Config{
		"none":                 {NextProtos: []string{"h2"}, InsecureSkipVerify: true},
		"another root's":       tunnelConfig(twin.leaf(t, idShop, nil)),
		"foreign trust domain": tunnelConfig(other.leaf(t, "spiffe://other.test/ns/a/sa/shop", nil)),
		"foreign ID, our root": tunnelConfig(root.leaf(t, "spiffe://other.test/ns/a/sa/shop", nil)),
		"our ID, foreign root": tunnelConfig(other.leaf(t, idShop, nil)),
		"expired": tunnelConfig(root.leaf(t, idShop, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = c.NotBefore.Add(-time.Hour), time.Now().Add(-30*time.Minute)
		})),
		"not valid yet":    tunnelConfig(root.leaf(t, idShop, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) })),
		"without an ID":    tunnelConfig(root.leaf(t, idShop, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"shop.lab.test"} })),
		"with two IDs":     tunnelConfig(root.leaf(t, idShop, func(c *x509.Certificate) { c.URIs = append(c.URIs, second) })),
		"for code signing": tunnelConfig(root.leaf(t, idShop, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} })),
		"for servers only": tunnelConfig(root.leaf(t, idShop, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })),
		"that is a CA's": tunnelConfig(root.leaf(t, idShop, func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
		})),
		"of the trust domain":    tunnelConfig(root.leaf(t, "spiffe://lab.test", nil)),
		"good, but over TLS 1.2": {Certificates: []tls.Certificate{good}, NextProtos: []string{"h2"}, MaxVersion: tls.VersionTLS12, InsecureSkipVerify: true},
		"good, but without ALPN": {Certificates: []tls.Certificate{good}, InsecureSkipVerify: true},
		"good, but for HTTP/1.1": {Certificates: []tls.Certificate{good}, NextProtos: []string{"http/1.1"}, InsecureSkipVerify: true},
		"signed by a leaf":       tunnelConfig(chained(t, good)),
	} {
		status, _, _, err := hbone{w.World, "192.0.2.2:15008", cfg}.connect(t, "192.0.2.2:80")
		if err == nil {
			t.Errorf("a certificate %s: status %d", name, status)
		}
	}
	if n := w.Status("b").Counters["handshake_errors"]; n < 10 {
		t.Errorf("status counts %d failed handshakes", n)
	}
}

// An agent is no proxy to elsewhere, and its tunnel carries CONNECT and nothing else.
func elsewhere(t *testing.T, w *shopWorld) {
	root := readAuthority(t, filepath.Join(w.Dir(), "ca"))
	h := hbone{w.World, "192.0.2.2:15008", tunnelConfig(root.leaf(t, idShop, nil))}
	for _, authority := range []string{"192.0.2.1:80", "198.51.100.1:80", "127.0.0.1:80", "[2001:db8::2]:80", "[::1]:80", "0.0.0.0:80", "[::ffff:127.0.0.1]:80",
		"192.0.2.2:0", "192.0.2.2:65536", "192.0.2.2", "web:80", "localhost:15008", "192.0.2.2:15001", "192.0.2.2:15006", "192.0.2.2:15008", "192.0.2.2:15020", "192.0.2.2:1", ":80"} {
		if status, _, _, err := h.connect(t, authority); err == nil && status/100 == 2 {
			t.Errorf("CONNECT to %s: status %d", authority, status)
		}
	}
	tr := &http2.Transport{DialTLSContext: func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) {
		raw, err := dialFrom(w.World, "a", h.addr)
		if err != nil {
			return nil, err
		}
		return tls.Client(raw, h.cfg), nil
	}}
	defer tr.CloseIdleConnections()
	for _, method := range []string{"GET", "POST", "OPTIONS"} {
		req, err := http.NewRequestWithContext(t.Context(), method, "https://192.0.2.2:80/health", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode < 400 {
				t.Errorf("%s in the tunnel: status %d", method, resp.StatusCode)
			}
		}
	}
}

// Who does not speak TLS on the tunnel's port gets nothing, and soon.
func plainOnTunnelPort(t *testing.T, w *shopWorld) {
	for name, text := range map[string]string{
		"HTTP":     request("/plain"),
		"h2c":      http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00",
		"garbage":  strings.Repeat("\xff", 1000),
		"half TLS": "\x16\x03\x01\x02\x00",
		"nothing":  "",
	} {
		c, err := dialFrom(w.World, "a", "192.0.2.2:15008")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, text)
		_ = c.(*net.TCPConn).CloseWrite()
		got, err := io.ReadAll(c)
		c.Close()
		// At most an alert, in which TLS says why (RFC 8446 section 6).
		if len(got) > 0 && got[0] != 21 || errors.Is(err, context.DeadlineExceeded) || strings.Contains(string(got), "HTTP") {
			t.Errorf("%s: answered %q, %v", name, got, err)
		}
	}
}

// Without an identity there is only what policy permits to anybody.
func strangers(t *testing.T, w *shopWorld) {
	for _, ip := range world.Addresses {
		c, err := dialFrom(w.World, "a", port(ip, "80"))
		if err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(c)
		for _, x := range []struct {
			target string
			status int
		}{{"/health", 200}, {"/orders/1", 401}, {"/health", 200}, {"/admin", 401}} {
			forged := strings.Replace(request(x.target), "\r\n\r\n", "\r\nX-Forwarded-Client-Cert: URI="+idShop+"\r\n\r\n", 1)
			if _, err := io.WriteString(c, forged); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%s: %v", x.target, err)
			}
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != x.status || strings.Contains(string(body), idShop) || strings.Contains(string(body), "URI=") {
				t.Errorf("%s: status %d, want %d: %s", x.target, resp.StatusCode, x.status, body)
			}
			if x.status == 401 && (resp.Header.Get("Www-Authenticate") == "" || resp.Header.Get("Ringfence-Decision") == "") {
				t.Errorf("%s: %+v", x.target, resp.Header)
			}
		}
		c.Close()
		// No connect permit for strangers, so any other service is closed to them.
		c, err = dialFrom(w.World, "a", port(ip, "7001"))
		if err == nil {
			if got, err := io.ReadAll(c); len(got) > 0 || err == nil {
				t.Errorf("a closed port answered %q, %v", got, err)
			}
			c.Close()
		}
	}
}
