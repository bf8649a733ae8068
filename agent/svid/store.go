// Package svid holds the X.509-SVIDs of this node's workloads: it makes one at
// first use, renews it at half its life, forgets it when nobody asks for it, and
// verifies the SVIDs of peers.
//
// It is not a certificate authority, and it does not ask whether a workload
// deserves its ID: attestation has answered that before an ID gets here.
//
// The invariants: private keys live in this process's memory only; a workload
// that had a valid SVID has one at every later moment until its issuer has been
// out of reach for half a lifetime; nothing expired is ever handed out.
package svid

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	// ErrClosed reports a Store whose Run has ended.
	ErrClosed = errors.New("svid: store is closed")
	// ErrUnavailable reports that there is no valid SVID for an ID and none could
	// be made; it wraps the issuer's error.
	ErrUnavailable = errors.New("svid: no valid SVID")
)

// Issuer signs X.509-SVIDs. Issue is called from several goroutines and returns
// within ctx: the chain, leaf first, without the root. A ttl of zero means the
// issuer's default. The chain's certificates are not changed afterwards.
type Issuer interface {
	Issue(ctx context.Context, id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error)
}

// Config is what a Store needs. Zero optional fields mean the default.
type Config struct {
	// Issuer signs for this node. Required.
	Issuer Issuer
	// Bundles gives the trust bundle of a trust domain, or an error for one that
	// is not trusted. Required. Federation is a source that knows more than one.
	Bundles x509bundle.Source
	// TTL is the life of the SVIDs asked for; zero leaves it to the issuer (1 h).
	TTL time.Duration
	// MaxIDs bounds how many SVIDs are held; zero means 4,096: one takes about
	// 8 KiB, and a node runs a few hundred workloads. Past it the one that was
	// asked for least recently goes.
	MaxIDs int
	// IssueTimeout bounds one call of Issue; zero means 10 s.
	IssueTimeout time.Duration
	// Skew is how far peers' clocks may be off when validity periods are checked;
	// zero means 30 s, negative none.
	Skew time.Duration
	// OnRenew is called after id's SVID was replaced or dropped, so that what was
	// built with the old one (tunnels) can be retired. The old one stays valid
	// until its own end. It is called without a lock held, from any goroutine
	// that uses the Store, and must not block.
	OnRenew func(id spiffeid.ID)
	// Log receives failures and renewals; nil means nothing is logged.
	Log *slog.Logger
}

const (
	defaultMaxIDs       = 4096
	defaultIssueTimeout = 10 * time.Second
	defaultSkew         = 30 * time.Second
)

func (c Config) check() (Config, error) {
	if c.Issuer == nil || c.Bundles == nil {
		return c, errors.New("svid: an issuer and a source of trust bundles are required")
	}
	if c.TTL < 0 || c.MaxIDs < 0 || c.IssueTimeout < 0 {
		return c, errors.New("svid: lifetimes, bounds and time-outs must not be negative")
	}
	if c.MaxIDs == 0 {
		c.MaxIDs = defaultMaxIDs
	}
	if c.IssueTimeout == 0 {
		c.IssueTimeout = defaultIssueTimeout
	}
	if c.Skew == 0 {
		c.Skew = defaultSkew
	}
	c.Skew = max(c.Skew, 0)
	if c.OnRenew == nil {
		c.OnRenew = func(spiffeid.ID) {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Store holds SVIDs by SPIFFE ID. Its methods may be called from many goroutines.
type Store struct {
	cfg      Config
	verifier verifier

	// base is the parent of all minting and ends with the Store.
	base   context.Context
	cancel context.CancelFunc
	// minting counts the goroutines that make SVIDs. Adds happen with mu held
	// and closed false.
	minting sync.WaitGroup
	wake    chan struct{} // one slot: the earliest due time may have changed

	// mu held means the map, the queue and every entry's fields marked so stand
	// still. It is never held while signing. Readers of a live SVID share it.
	mu      sync.RWMutex
	closed  bool
	entries map[spiffeid.ID]*entry
	queue   queue // entries that are waiting for something, by due time
	// renewals counts the attempts that Run has under way, at most atOnce.
	renewals int
}

// New makes a Store. It starts nothing: SVIDs are made at first use, and renewed
// while [Store.Run] runs.
func New(cfg Config) (*Store, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, err
	}
	s := &Store{
		cfg:     cfg,
		wake:    make(chan struct{}, 1),
		entries: make(map[spiffeid.ID]*entry),
	}
	s.verifier.init(cfg.Bundles, cfg.Skew)
	s.base, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Certificate returns id's current SVID: full chain without the root, private
// key, Leaf set. The same pointer is returned until the SVID is replaced; it
// must not be changed. When there is none, one is made, for all that ask at the
// same time at once; a caller whose ctx ends stops waiting, the others do not.
//
// It returns [ErrUnavailable] when none can be made, and [ErrClosed] when the
// Store has ended and holds none. An expired SVID is never returned.
func (s *Store) Certificate(ctx context.Context, id spiffeid.ID) (*tls.Certificate, error) {
	now := time.Now()
	s.mu.RLock()
	e := s.entries[id]
	s.mu.RUnlock()
	if e != nil {
		if cert := e.use(now); cert != nil {
			if e.asleep.Load() {
				s.rouse(e, now)
			}
			return cert, nil
		}
	}
	return s.wait(ctx, id)
}

// wait joins the attempt to make id's SVID that is under way, or starts one.
func (s *Store) wait(ctx context.Context, id spiffeid.ID) (*tls.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("SVID of %q: %w", id, err)
	}
	e, m, evicted, err := s.join(id, time.Now())
	if !evicted.IsZero() {
		s.cfg.OnRenew(evicted)
	}
	if err != nil {
		return nil, fmt.Errorf("SVID of %q: %w", id, err)
	}
	if m != nil {
		select {
		case <-m.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("SVID of %q: %w", id, ctx.Err())
		}
		if m.err != nil {
			return nil, fmt.Errorf("SVID of %q: %w", id, m.err)
		}
	}
	if cert := e.use(time.Now()); cert != nil {
		return cert, nil
	}
	return nil, fmt.Errorf("SVID of %q: %w: it expired while it was being made", id, ErrUnavailable)
}

// Status describes one SVID that is held.
type Status struct {
	ID        spiffeid.ID `json:"id"`
	Serial    string      `json:"serial,omitempty"` // hexadecimal
	NotBefore time.Time   `json:"not_before,omitzero"`
	NotAfter  time.Time   `json:"not_after,omitzero"`
	RenewAt   time.Time   `json:"renew_at,omitzero"` // also when it is next tried after a failure
	LastUsed  time.Time   `json:"last_used,omitzero"`
	// Failures counts the attempts that failed since the last success.
	Failures  int    `json:"failures,omitempty"`
	LastError string `json:"last_error,omitempty"`
}

// Status lists the IDs that are held, sorted by ID, those without a valid SVID
// included.
func (s *Store) Status() []Status {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]Status, 0, len(s.entries))
	for _, e := range s.entries {
		out = append(out, e.statusLocked())
	}
	sortStatus(out)
	return out
}

// Close ends the Store: attempts under way are cancelled and waited for, and no
// SVID is made any more. Live ones are still handed out until they expire. It
// may be called more than once.
func (s *Store) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.minting.Wait()
}
