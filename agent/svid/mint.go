package svid

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca"
)

// join finds or makes id's entry, and the attempt to wait for: nil when the
// entry turned out to have an SVID after all. It names the ID that had to make
// room, if any.
func (s *Store) join(id spiffeid.ID, now time.Time) (e *entry, m *mint, evicted spiffeid.ID, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e = s.entries[id]
	switch {
	case e != nil && e.valid(now):
		return e, nil, evicted, nil
	case e != nil && e.mint != nil:
		return e, e.mint, evicted, nil
	case s.closed:
		return nil, nil, evicted, ErrClosed
	case e != nil && e.failures > 0 && wall(now).Before(e.due):
		// The issuer has just failed: answering so at once is kinder to it, and
		// to a caller who holds a connection, than asking it again.
		e.lastUsed.Store(now.UnixNano())
		return nil, nil, evicted, e.lastErr
	}
	if e == nil {
		if evicted, err = s.makeRoomLocked(); err != nil {
			return nil, nil, evicted, err
		}
		e = &entry{id: id, index: -1}
		s.entries[id] = e
	}
	e.lastUsed.Store(now.UnixNano())
	return e, s.startLocked(e, false), evicted, nil
}

// makeRoomLocked forgets the entry that was wanted least recently when the Store
// is full, and returns its ID. The map is walked only then, next to a signature
// that costs more.
func (s *Store) makeRoomLocked() (spiffeid.ID, error) {
	if len(s.entries) < s.cfg.MaxIDs {
		return spiffeid.ID{}, nil
	}
	var oldest *entry
	for _, e := range s.entries {
		if e.mint == nil && (oldest == nil || e.lastUsed.Load() < oldest.lastUsed.Load()) {
			oldest = e
		}
	}
	if oldest == nil {
		return spiffeid.ID{}, fmt.Errorf("%w: %d are being made at this moment", ErrUnavailable, len(s.entries))
	}
	s.forgetLocked(oldest)
	return oldest.id, nil
}

func (s *Store) forgetLocked(e *entry) {
	s.queue.drop(e)
	delete(s.entries, e.id)
}

// startLocked makes e's SVID in a goroutine of its own: whoever asked first may
// give up waiting, and the others must not suffer for it.
func (s *Store) startLocked(e *entry, renewal bool) *mint {
	m := &mint{done: make(chan struct{}), renewal: renewal}
	e.mint = m
	e.asleep.Store(false)
	if renewal {
		s.renewals++
	}
	s.minting.Go(func() { s.attempt(e, m) })
	return m
}

// attempt makes e's SVID once, and files the result.
func (s *Store) attempt(e *entry, m *mint) {
	ctx, cancel := context.WithTimeout(s.base, s.cfg.IssueTimeout)
	defer cancel()
	h, err := s.make(ctx, e.id)
	replaced := false
	if err == nil {
		replaced = e.current.Swap(h) != nil
	}
	s.file(e, m, h, err)
	if replaced {
		s.cfg.OnRenew(e.id)
	}
}

func (s *Store) file(e *entry, m *mint, h *held, err error) {
	now := time.Now()
	s.mu.Lock()
	e.mint, e.tried = nil, now.UnixNano()
	if m.renewal {
		s.renewals--
	}
	if err == nil {
		e.failures, e.lastErr = 0, nil
		s.queue.set(e, halfLife(now, h.notAfter))
	} else {
		e.failures++
		e.lastErr = fmt.Errorf("%w: %w", ErrUnavailable, err)
		m.err = e.lastErr
		s.queue.set(e, wall(now).Add(retryAfter(e.failures)))
	}
	failures, due := e.failures, e.due
	s.mu.Unlock()
	close(m.done)
	s.nudge()
	s.report(e, h, err, failures, due)
}

func (s *Store) report(e *entry, h *held, err error, failures int, due time.Time) {
	switch {
	case err == nil:
		s.cfg.Log.Debug("SVID made", "id", e.id, "serial", h.cert.Leaf.SerialNumber.Text(16), "not_after", h.notAfter)
	case s.base.Err() != nil: // closing; nobody is missing an SVID
	default:
		attrs := []any{"id", e.id, "err", err, "failures", failures, "retry_at", due}
		if old := e.current.Load(); old != nil {
			attrs = append(attrs, "old_not_after", old.notAfter)
		}
		s.cfg.Log.Warn("SVID could not be made", attrs...)
	}
}

// nudge makes Run look at the queue again.
func (s *Store) nudge() {
	select {
	case s.wake <- struct{}{}:
	default: // Run has not taken the last one yet, and will see this change too
	}
}

// make generates a key, has it signed, and checks what came back.
func (s *Store) make(ctx context.Context, id spiffeid.ID) (*held, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	chain, err := s.cfg.Issuer.Issue(ctx, id, key.Public(), s.cfg.TTL)
	if err != nil {
		return nil, err
	}
	if err := checkIssued(chain, id, key, time.Now()); err != nil {
		return nil, fmt.Errorf("the issuer's answer is unusable: %w", err)
	}
	cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return &held{cert: cert, notAfter: ends(chain)}, nil
}

// checkIssued holds an issuer to what was asked. An issuer on another machine
// may be of another version, or mistaken.
func checkIssued(chain []*x509.Certificate, id spiffeid.ID, key *ecdsa.PrivateKey, now time.Time) error {
	if len(chain) == 0 {
		return errors.New("empty chain")
	}
	named, err := ca.CheckLeaf(chain[0])
	switch {
	case err != nil:
		return err
	case named != id:
		return fmt.Errorf("it is for %s", named)
	case !key.PublicKey.Equal(chain[0].PublicKey):
		return errors.New("it is for another key")
	case now.Before(chain[0].NotBefore):
		return fmt.Errorf("it begins at %s, is the clock right?", chain[0].NotBefore)
	case !now.Before(ends(chain)):
		return fmt.Errorf("it ended at %s, is the clock right?", ends(chain))
	}
	for i, c := range chain[:len(chain)-1] {
		if !bytes.Equal(c.RawIssuer, chain[i+1].RawSubject) {
			return errors.New("its chain is out of order")
		}
	}
	return nil
}

// ends returns when the first certificate of the chain ends.
func ends(chain []*x509.Certificate) time.Time {
	end := chain[0].NotAfter
	for _, c := range chain[1:] {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}
