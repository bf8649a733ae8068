package ca

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ringfence.dev/ca/keystore"
	"ringfence.dev/test/nettest"
)

// TestOpenSSLAgrees has another implementation judge a chain, for both roles of TLS.
func TestOpenSSLAgrees(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		nettest.Missing(t, "openssl is not installed")
	}
	a := newAuthority(t)
	chain := mustIssue(t, a, "spiffe://lab.test/ns/b/sa/web", 0)
	roots, err := a.GetX509BundleForTrustDomain(lab)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{
		"root.pem":  keystore.EncodeCertificates(roots.X509Authorities()),
		"inter.pem": keystore.EncodeCertificates(chain[1:]),
		"leaf.pem":  keystore.EncodeCertificates(chain[:1]),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, purpose := range []string{"sslserver", "sslclient"} {
		out, err := exec.Command(openssl, "verify", "-x509_strict", "-purpose", purpose,
			"-CAfile", filepath.Join(dir, "root.pem"), "-untrusted", filepath.Join(dir, "inter.pem"),
			filepath.Join(dir, "leaf.pem")).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "leaf.pem: OK") {
			t.Errorf("openssl verify -purpose %s: %v\n%s", purpose, err, out)
		}
	}
	out, err := exec.Command(openssl, "x509", "-in", filepath.Join(dir, "leaf.pem"), "-noout", "-text").CombinedOutput()
	for _, want := range []string{"URI:spiffe://lab.test/ns/b/sa/web", "X509v3 Subject Alternative Name: critical", "CA:FALSE", "Digital Signature\n"} {
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("openssl x509 (%v) does not show %q:\n%s", err, want, out)
		}
	}
}
