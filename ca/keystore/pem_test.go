package keystore_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"ringfence.dev/ca/keystore"
)

func newPair(t testing.TB, key crypto.Signer) keystore.Pair {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return keystore.Pair{Key: key, Chain: []*x509.Certificate{cert}}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func encode(t testing.TB, p keystore.Pair) []byte {
	t.Helper()
	data, err := keystore.EncodePair(p)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestPairRoundTrip(t *testing.T) {
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	for _, key := range []crypto.Signer{newKey(t), ed} {
		p := newPair(t, key)
		p.Chain = append(p.Chain, newPair(t, newKey(t)).Chain...)
		got, err := keystore.DecodePair(encode(t, p))
		if err != nil {
			t.Fatal(err)
		}
		if !got.Key.(interface{ Equal(crypto.PrivateKey) bool }).Equal(key) || len(got.Chain) != 2 || !got.Chain[1].Equal(p.Chain[1]) {
			t.Errorf("%T: read back another pair", key)
		}
	}
}

// Files as openssl ecparam -genkey writes them: parameters first, SEC 1 key.
func TestOpenSSLStyleKey(t *testing.T) {
	key := newKey(t)
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	data := pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 8, 42, 134, 72, 206, 61, 3, 1, 7}})
	data = append(data, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})...)
	data = append(data, "subject=/CN=x\n"...)
	data = append(data, keystore.EncodeCertificates(newPair(t, key).Chain)...)
	if _, err := keystore.DecodePair(data); err != nil {
		t.Error(err)
	}
}

func TestBadPEM(t *testing.T) {
	p := newPair(t, newKey(t))
	good := string(encode(t, p))
	key, cert, _ := strings.Cut(good, "-----BEGIN CERTIFICATE")
	cert = "-----BEGIN CERTIFICATE" + cert
	other := string(keystore.EncodeCertificates(newPair(t, newKey(t)).Chain))
	cases := map[string]string{
		"empty":             "",
		"not PEM":           "hello",
		"certificate only":  cert,
		"key only":          key,
		"two keys":          key + key + cert,
		"another's key":     key + other,
		"cut off":           good[:len(good)-40],
		"damaged":           strings.Replace(good, "\nM", "\n*", 1),
		"encrypted":         strings.ReplaceAll(key, "PRIVATE", "ENCRYPTED PRIVATE") + cert,
		"unknown block":     key + cert + "-----BEGIN FOO-----\nAAAA\n-----END FOO-----\n",
		"certificate torn":  key + "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
		"key in cert block": strings.ReplaceAll(key, "PRIVATE KEY", "CERTIFICATE"),
	}
	for name, data := range cases {
		if _, err := keystore.DecodePair([]byte(data)); err == nil {
			t.Errorf("%s: accepted", name)
		} else if secret := strings.Split(key, "\n")[1]; strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error shows the key", name)
		}
	}
	if _, err := keystore.DecodePair([]byte(cert)); !errors.Is(err, keystore.ErrNoKey) {
		t.Errorf("without a key: %v", err)
	}
	if _, err := keystore.DecodeCertificates([]byte(good)); err == nil {
		t.Error("a private key was taken for a certificate")
	}
	if _, err := keystore.DecodeCertificates([]byte("text")); err == nil {
		t.Error("no certificate was accepted")
	}
	if certs, err := keystore.DecodeCertificates([]byte(cert + other)); err != nil || len(certs) != 2 {
		t.Errorf("two certificates: %d, %v", len(certs), err)
	}
}

func FuzzDecodePair(f *testing.F) {
	f.Add(encode(f, newPair(f, newKey(f))))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := keystore.DecodePair(data)
		if err != nil {
			return
		}
		again, err := keystore.DecodePair(encode(t, p))
		if err != nil || len(again.Chain) != len(p.Chain) || !bytes.Equal(again.Chain[0].Raw, p.Chain[0].Raw) {
			t.Fatalf("did not survive a round trip: %v", err)
		}
	})
}
