package keystore

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// Pair is a private key with the certificate chain that speaks for it, leaf or
// issuing certificate first. Both are kept in one file, because two files could
// be torn apart by a crash.
type Pair struct {
	Key   crypto.Signer
	Chain []*x509.Certificate
}

// ErrNoKey reports PEM data without a private key.
var ErrNoKey = errors.New("no private key in the file")

// EncodePair writes the key (PKCS #8) and then the chain as PEM.
func EncodePair(p Pair) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(p.Key)
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	var out bytes.Buffer
	if err := pem.Encode(&out, &pem.Block{Type: "PRIVATE KEY", Bytes: der}); err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	out.Write(EncodeCertificates(p.Chain))
	return out.Bytes(), nil
}

// EncodeCertificates writes certificates as PEM, in the order given.
func EncodeCertificates(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// DecodePair reads a PEM file that holds exactly one private key and at least
// one certificate, the first of which belongs to the key. It returns [ErrNoKey]
// when the key is missing.
func DecodePair(data []byte) (Pair, error) {
	p, err := decode(data)
	switch {
	case err != nil:
		return Pair{}, err
	case p.Key == nil:
		return Pair{}, ErrNoKey
	case len(p.Chain) == 0:
		return Pair{}, errors.New("no certificate in the file")
	case !samePublicKey(p.Key.Public(), p.Chain[0].PublicKey):
		return Pair{}, errors.New("the private key does not belong to the first certificate")
	}
	return p, nil
}

// DecodeCertificates reads a PEM file that holds certificates only.
func DecodeCertificates(data []byte) ([]*x509.Certificate, error) {
	p, err := decode(data)
	if err != nil {
		return nil, err
	}
	if p.Key != nil {
		return nil, errors.New("the file holds a private key where only certificates belong")
	}
	if len(p.Chain) == 0 {
		return nil, errors.New("no certificate in the file")
	}
	return p.Chain, nil
}

func decode(data []byte) (Pair, error) {
	var p Pair
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			return p, checkRest(data)
		}
		if err := p.add(block); err != nil {
			return Pair{}, err
		}
	}
}

// checkRest refuses a file that was cut off inside a block; text around blocks is fine.
func checkRest(rest []byte) error {
	if bytes.Contains(rest, []byte("-----BEGIN ")) {
		return errors.New("a PEM block is cut off or damaged")
	}
	return nil
}

func (p *Pair) add(block *pem.Block) error {
	switch block.Type {
	case "CERTIFICATE":
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("certificate %d: %w", len(p.Chain)+1, err)
		}
		p.Chain = append(p.Chain, cert)
		return nil
	case "EC PARAMETERS": // openssl writes it before the key, and the key repeats it
		return nil
	}
	key, err := parseKey(block)
	if err != nil {
		return err
	}
	if p.Key != nil {
		return errors.New("more than one private key in the file")
	}
	p.Key = key
	return nil
}

func parseKey(block *pem.Block) (crypto.Signer, error) {
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		return nil, errors.New("the private key is encrypted; decrypt it first: openssl pkey -in FILE")
	default:
		return nil, fmt.Errorf("unexpected PEM block %q", block.Type)
	}
	if err != nil {
		// The cause may quote key material's structure, which nobody needs in a log.
		return nil, fmt.Errorf("PEM block %q holds no usable key", block.Type)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("PEM block %q holds a key that cannot sign", block.Type)
	}
	return signer, nil
}

func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
