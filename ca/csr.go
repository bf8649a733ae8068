package ca

import (
	"context"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// IssueCSR signs an X.509-SVID for a PKCS #10 request (DER). The request must
// prove its key, and carry one URI name and nothing else that a certificate
// could inherit: a request that asks for more than it will get is refused rather
// than trimmed, since whoever made it expected something else.
//
// The caller must have made sure that the requester may have the ID, which
// [ParseCSR] tells.
func (a *Authority) IssueCSR(ctx context.Context, der []byte, ttl time.Duration) ([]*x509.Certificate, error) {
	id, csr, err := ParseCSR(der)
	if err != nil {
		return nil, fmt.Errorf("issue SVID by request: %w", err)
	}
	return a.Issue(ctx, id, csr.PublicKey, ttl)
}

// maxCSR bounds a request: a 2,048 octet ID, an 8,192 bit key and its signature
// fit three times.
const maxCSR = 16 << 10

// ParseCSR reads a PKCS #10 request and returns the SPIFFE ID that it asks for.
// Errors match [ErrRefused].
func ParseCSR(der []byte) (spiffeid.ID, *x509.CertificateRequest, error) {
	if len(der) > maxCSR {
		return spiffeid.ID{}, nil, fmt.Errorf("%w: request of %d octets", ErrRefused, len(der))
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("%w: malformed request: %v", ErrRefused, err)
	}
	// The key first: checking a signature by an absurd key is work for a stranger.
	if err := CheckKey(csr.PublicKey); err != nil {
		return spiffeid.ID{}, nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("%w: the request does not prove its key: %v", ErrRefused, err)
	}
	id, err := requestedID(csr)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return id, csr, nil
}

func requestedID(csr *x509.CertificateRequest) (spiffeid.ID, error) {
	if len(csr.Extensions) != 1 || !csr.Extensions[0].Id.Equal(oidSAN) {
		return spiffeid.ID{}, broken("the request must have the subject alternative name and no other extension")
	}
	names, err := generalNames(csr.Extensions[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	if len(names) != 1 || names[0].Class != asn1.ClassContextSpecific || names[0].Tag != tagURI {
		return spiffeid.ID{}, broken("the request must have one URI name and no other, it has %d names", len(names))
	}
	return parseID(string(names[0].Bytes))
}
