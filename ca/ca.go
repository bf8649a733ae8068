// Package ca is the certificate authority inside ringfence: it makes a root and
// an intermediate for a trust domain, keeps them in one state directory, and
// signs X.509-SVIDs.
//
// It decides what a certificate may look like and who may be named in it: one
// SPIFFE ID of its own trust domain. Whether a workload deserves an ID is the
// caller's question (attestation and registration), never asked here.
//
// The state directory holds
//
//	state.json        format version and trust domain
//	root.pem          root key and certificate; only where the CA was made
//	intermediate.pem  the key that signs SVIDs, with its certificates
//	bundle.json       the trust bundle: the set of roots that peers may chain to
//
// The invariant: an existing key is never overwritten by making another CA, and
// a root leaves the bundle only by an operator's hand, so that a crash at any
// step, or two processes starting at once, end in one CA.
package ca

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca/keystore"
)

// DefaultDir is where the state lives unless configured otherwise.
const DefaultDir = "/var/lib/ringfence/ca"

// Lifetimes and margins.
const (
	// DefaultTTL is the life of an SVID when the caller names none.
	DefaultTTL = time.Hour
	// MaxTTL is the longest life an SVID may be given.
	MaxTTL = 24 * time.Hour
	// Backdate is how far NotBefore lies in the past, for peers whose clocks are slow.
	Backdate = 5 * time.Minute
	// RootTTL is the life of a root.
	RootTTL = 10 * 365 * 24 * time.Hour
	// MaxIntermediateTTL is the longest life of an intermediate, and what one
	// made for another node gets, since nobody renews it there.
	MaxIntermediateTTL = 365 * 24 * time.Hour
	// ownIntermediateTTL is the life of the intermediate beside its root.
	ownIntermediateTTL = 90 * 24 * time.Hour
)

var (
	// ErrNoCA reports a directory without a CA or without an intermediate to sign with.
	ErrNoCA = errors.New("ca: no certificate authority here")
	// ErrConflict reports that what is to be installed or made contradicts what
	// the directory already holds. Nothing was changed.
	ErrConflict = errors.New("ca: conflicts with the existing certificate authority")
	// ErrNoRoot reports that the root's private key is not in the directory.
	ErrNoRoot = errors.New("ca: the root key is not here")
	// ErrRefused reports a request that no retry will make acceptable.
	ErrRefused = errors.New("ca: request refused")
	// ErrForeign reports a trust domain that is not the authority's own.
	ErrForeign = errors.New("ca: foreign trust domain")
	// ErrExpired reports that the authority's own certificate has ended.
	ErrExpired = errors.New("ca: the issuing certificate has expired")
	// ErrClock reports a system clock that cannot be right.
	ErrClock = errors.New("ca: the system clock is wrong")
	// ErrState reports state that this version cannot read.
	ErrState = errors.New("ca: unusable state")
	// ErrProfile reports a certificate that is not what an X.509-SVID or its issuer must be.
	ErrProfile = errors.New("ca: certificate breaks the X.509-SVID profile")
)

// Options change defaults. The zero value is right for most uses.
type Options struct {
	// TrustDomain is needed by the install functions only when the directory is
	// empty and the certificates do not name their trust domain themselves.
	TrustDomain spiffeid.TrustDomain
	// IntermediateTTL is the life of intermediates: zero means 90 days for the
	// one beside its root, and a year for those made for other nodes. More than
	// a year is refused.
	IntermediateTTL time.Duration
	// Record is called with every certificate before it is handed out; its error
	// refuses the certificate. Nil records nothing. See [OpenLog].
	Record func(Issuance) error
	// Log receives what the operator should know; nil means nothing is logged.
	Log *slog.Logger

	fs keystore.FS // tests inject faults here
}

func (o Options) check() (Options, error) {
	if o.IntermediateTTL < 0 || o.IntermediateTTL > MaxIntermediateTTL {
		return o, fmt.Errorf("%w: an intermediate may live up to a year, not %v", ErrRefused, o.IntermediateTTL)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Record == nil {
		o.Record = func(Issuance) error { return nil }
	}
	if o.fs == nil {
		o.fs = keystore.OS{}
	}
	return o, nil
}

func (o Options) intermediateTTL(fallback time.Duration) time.Duration {
	if o.IntermediateTTL != 0 {
		return o.IntermediateTTL
	}
	return fallback
}
