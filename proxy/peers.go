package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
)

var (
	// errSilent reports a peer that neither accepts nor refuses on the tunnel's
	// port. That is no proof that it has no agent.
	errSilent    = errors.New("peer does not answer on the tunnel's port")
	errChanged   = errors.New("peer's identity is not the one known for its address")
	errPeersFull = errors.New("too many peers to remember")
)

// peerState is what is known of the agent at an address.
type peerState uint8

const (
	peerUnknown peerState = iota
	peerAgent             // it has spoken HBONE; kept until an operator clears it
	peerNone              // it refused the connection; believed for a while
	peerSilent            // it did not answer; believed for a moment
)

var peerStateNames = [...]string{"unknown", "agent", "none", "silent"}

func (s peerState) String() string { return peerStateNames[s] }

// silentFor is how long a silent peer is not asked again: long enough not to
// add the probe to every connection, short enough to notice an agent starting.
const silentFor = 5 * time.Second

type peerKey struct {
	scope string
	ip    netip.Addr
}

type peer struct {
	state   peerState
	until   time.Time     // of peerNone and peerSilent
	group   string        // of peerAgent: whom its workloads belong to
	lastID  string        // of peerAgent: the identity shown last
	probing chan struct{} // closed when the probe under way is over; nil for none
}

// peerTable remembers which peers have an agent. It is bounded: a workload can
// dial any number of addresses, but only what answered as an agent stays.
type peerTable struct {
	max  int
	pins map[netip.Addr]string

	// mu held means m agrees with the probes under way.
	mu sync.Mutex
	m  map[peerKey]*peer
}

// probe tells the agent's presence by connecting: nil when somebody accepts.
type probe func(ctx context.Context) error

// carrier says whether connections to ip go through a tunnel. It probes at
// most once at a time and per lifetime of the answer. An error means that it is
// not known, and an enforcing caller refuses.
func (t *peerTable) carrier(ctx context.Context, k peerKey, noneFor time.Duration, ask probe) (Carrier, error) {
	if _, pinned := t.pins[k.ip]; pinned {
		return CarrierTunnel, nil
	}
	for {
		t.mu.Lock()
		p := t.m[k]
		if p == nil {
			if !t.roomLocked() {
				t.mu.Unlock()
				return "", errPeersFull
			}
			p = &peer{}
			t.m[k] = p
		}
		known := p.state == peerAgent || (p.state != peerUnknown && time.Now().Before(p.until))
		if known {
			state := p.state
			t.mu.Unlock()
			return verdict(state)
		}
		if wait := p.probing; wait != nil {
			t.mu.Unlock()
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return "", ctx.Err()
			}
		}
		p.probing = make(chan struct{})
		t.mu.Unlock()
		return verdict(t.learn(p, noneFor, ask(ctx)))
	}
}

func verdict(s peerState) (Carrier, error) {
	switch s {
	case peerAgent, peerUnknown: // unknown: it accepted; the handshake will tell
		return CarrierTunnel, nil
	case peerNone:
		return CarrierPlain, nil
	default:
		return "", errSilent
	}
}

// learn files a probe's outcome. Only a refusal says that there is no agent; a
// time-out or an unreachable net says nothing.
func (t *peerTable) learn(p *peer, noneFor time.Duration, err error) peerState {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(p.probing)
	p.probing = nil
	now := time.Now()
	switch {
	case p.state == peerAgent: // learnt meanwhile
	case err == nil:
		p.state = peerUnknown
	case errors.Is(err, unix.ECONNREFUSED):
		p.state, p.until = peerNone, now.Add(noneFor)
	default:
		p.state, p.until = peerSilent, now.Add(silentFor)
	}
	return p.state
}

// roomLocked makes room for one more peer by forgetting one that is not known
// to have an agent. Forgetting the others would let plaintext through to them.
func (t *peerTable) roomLocked() bool {
	if len(t.m) < t.max {
		return true
	}
	for k, p := range t.m {
		if p.state != peerAgent && p.probing == nil {
			delete(t.m, k)
			return true
		}
	}
	return false
}

// spoke files that the agent at an address showed an identity, and says whether
// that may be: it must fit the pin, or what the address showed before. Hosts
// carry many workloads, so it is the group that must stay: trust domain and
// path without the last /sa/NAME.
func (t *peerTable) spoke(k peerKey, id spiffeid.ID) error {
	if pin, ok := t.pins[k.ip]; ok && !pinned(pin, id.String()) {
		return fmt.Errorf("%w: %s shows %s, pinned is %s", errChanged, k.ip, id, pin)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.m[k]
	if p == nil {
		if !t.roomLocked() {
			return errPeersFull
		}
		p = &peer{}
		t.m[k] = p
	}
	group := groupOf(id)
	if p.state == peerAgent && p.group != group {
		return fmt.Errorf("%w: %s shows %s, known is %s", errChanged, k.ip, id, p.lastID)
	}
	p.state, p.group, p.lastID = peerAgent, group, id.String()
	return nil
}

func pinned(pin, id string) bool {
	rest, ok := strings.CutPrefix(id, strings.TrimSuffix(pin, "/"))
	return ok && (rest == "" || rest[0] == '/')
}

// groupOf is an identity without its workload: spiffe://td/ns/HOST of
// spiffe://td/ns/HOST/sa/NAME, and the trust domain of any other shape.
func groupOf(id spiffeid.ID) string {
	s := id.String()
	if i := strings.LastIndex(s, "/sa/"); i > 0 && strings.HasPrefix(id.Path(), "/ns/") {
		return s[:i]
	}
	return id.TrustDomain().IDString()
}

// clear forgets what is known of ip in every scope.
func (t *peerTable) clear(ip netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, p := range t.m {
		if k.ip == ip && p.probing == nil {
			delete(t.m, k)
		}
	}
}

// forget drops the peers of a scope that is gone.
func (t *peerTable) forget(scope string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k := range t.m {
		if k.scope == scope {
			delete(t.m, k)
		}
	}
}
