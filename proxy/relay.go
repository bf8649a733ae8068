package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/proxy/socket"
	"ringfence.dev/proxy/tunnel"
)

// ErrStopped reports use of a relay or scope that is draining or gone.
var ErrStopped = errors.New("proxy: stopped")

// Relay carries the connections of all scopes. All methods may be called from
// any goroutine. It starts nothing by itself: [Scope.Serve] does the work.
type Relay struct {
	cfg   Config
	pool  *tunnel.Pool
	peers peerTable
	count counters

	// mu held means scopes is complete: nothing is added once stopping.
	mu          sync.Mutex
	scopes      map[string]*Scope
	stopping    bool
	reevaluated atomic.Int64 // when Reevaluate was last called, UnixNano
}

// New makes a relay. Drain or Close ends it.
func New(cfg Config) (*Relay, error) {
	cfg, err := cfg.checked()
	if err != nil {
		return nil, err
	}
	r := &Relay{
		cfg:    cfg,
		scopes: make(map[string]*Scope),
		peers:  peerTable{max: cfg.MaxPeers, pins: cfg.Pins, m: make(map[peerKey]*peer)},
	}
	r.pool = tunnel.NewPool(tunnel.PoolConfig{
		Dial: r.dialTunnel, DialTimeout: cfg.SetupTimeout,
		Unused: cfg.Unused, Retired: cfg.Retired,
	})
	return r, nil
}

// AddScope adds a scope. Its connections are accepted from Serve on.
func (r *Relay) AddScope(c ScopeConfig) (*Scope, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	s, err := r.newScope(c)
	if err != nil {
		return nil, fmt.Errorf("proxy: scope %s: %w", c.Name, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.stopping:
		err = ErrStopped
	case r.scopes[c.Name] != nil:
		err = fmt.Errorf("proxy: scope %s exists already", c.Name)
	default:
		r.scopes[c.Name] = s
		return s, nil
	}
	s.closeListeners()
	return nil, err
}

func (r *Relay) scope(name string) *Scope {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.scopes[name]
}

func (r *Relay) all() []*Scope {
	r.mu.Lock()
	defer r.mu.Unlock()
	scopes := make([]*Scope, 0, len(r.scopes))
	for _, s := range r.scopes {
		scopes = append(scopes, s)
	}
	return scopes
}

func (r *Relay) remove(s *Scope) {
	r.mu.Lock()
	if r.scopes[s.name] == s {
		delete(r.scopes, s.name)
	}
	r.mu.Unlock()
	r.peers.forget(s.name)
	r.pool.RetireScope(s.name)
}

// Reevaluate decides every live connection again, after policies have changed.
// It resets those that are no longer permitted, leaves the others alone, and
// returns how many it reset.
func (r *Relay) Reevaluate() int {
	r.reevaluated.Store(time.Now().UnixNano()) // before looking: see decidedLately
	n := 0
	for _, s := range r.all() {
		n += s.reevaluate()
	}
	return n
}

// decidedLately reports whether a link that was decided at most a set-up ago may
// have been decided by policies that have gone since. It is asked when the link
// is in the table, where the next Reevaluate finds it.
func (r *Relay) decidedLately() bool {
	since := time.Duration(time.Now().UnixNano() - r.reevaluated.Load())
	return since < r.cfg.SetupTimeout+time.Second
}

// Retire ends the use of a workload's replaced certificate: no new streams go
// into tunnels that show it, and live ones end by Config.Retired. (The client
// side of it happens by itself at the next connection.)
func (r *Relay) Retire(id spiffeid.ID) {
	r.pool.Retire(id)
	for _, s := range r.all() {
		s.retire(id)
	}
}

// ClearPeer forgets what is known of the agent at ip: whether it has one, and
// whose identities it showed.
func (r *Relay) ClearPeer(ip netip.Addr) { r.peers.clear(ip.Unmap()) }

// Drain stops accepting in every scope, tells peers to open no new streams,
// lets live connections finish until ctx ends, and resets the rest. When it
// returns, every Serve is about to return and nothing is left running. The
// relay is of no use afterwards.
func (r *Relay) Drain(ctx context.Context) {
	r.mu.Lock()
	r.stopping = true
	r.mu.Unlock()
	r.pool.GoAway()
	var wg sync.WaitGroup
	for _, s := range r.all() {
		wg.Go(func() { s.Drain(ctx) })
	}
	wg.Wait()
	r.pool.Close()
}

// Close ends everything at once.
func (r *Relay) Close() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	r.Drain(ctx)
}

// dialTunnel makes the client end of a tunnel for the pool.
func (r *Relay) dialTunnel(ctx context.Context, key tunnel.Key, cert *tls.Certificate) (*tunnel.Conn, error) {
	s := r.scope(key.Scope)
	if s == nil {
		return nil, ErrStopped
	}
	f := flow.Flow{
		Scope: key.Scope, Direction: flow.Outbound,
		Destination: key.To, Device: key.Device, BoundSource: key.Bound,
	}
	to := netip.AddrPortFrom(key.To.Addr(), tunnel.Port)
	sock, err := s.dial(ctx, Dial{To: to, Flow: f})
	if err != nil {
		return nil, fmt.Errorf("tunnel to %s: %w", key.To, err)
	}
	deadline, _ := ctx.Deadline()
	conn, err := tunnel.Client(sock, tunnel.ClientConfig{
		Certificate: cert, Verify: r.cfg.Credentials.Verify,
		Port: key.To.Port(), Deadline: deadline,
	})
	if err != nil {
		r.count.handshakeErrors.Add(1)
		err = withoutCertificate(err, key.To.Port())
	}
	return conn, err
}

// alertInternalError is TLS alert 80 (RFC 8446 section 6.2), which a server sends
// when it has no certificate to show.
const alertInternalError tls.AlertError = 80

// withoutCertificate says what that alert mostly means between agents.
func withoutCertificate(err error, port uint16) error {
	var remote *net.OpError // crypto/tls tells a peer's alert in this form, with a type of its own inside
	if errors.As(err, &remote) && remote.Op == "remote error" && remote.Err.Error() == alertInternalError.Error() {
		return fmt.Errorf("the peer's agent has no certificate for port %d: nobody listens there, or who does has no identity (%w)", port, err)
	}
	return err
}

// dial opens a prepared socket inside the scope and connects it.
func (s *Scope) dial(ctx context.Context, d Dial) (*socket.Conn, error) {
	fd, err := s.network.Socket(socket.Family(d.To.Addr()))
	if err != nil {
		return nil, err
	}
	if err := socket.Tune(fd, s.relay.cfg.timeouts()); err != nil {
		socket.ResetFD(fd)
		return nil, err
	}
	if err := s.network.BeforeConnect(fd, d); err != nil {
		socket.ResetFD(fd)
		return nil, fmt.Errorf("prepare to dial %s: %w", d.To, err)
	}
	return socket.Connect(ctx, fd, d.To)
}

// open starts the decision of a connection.
func (r *Relay) open(c authz.Connection) (authz.Session, error) {
	session, err := r.cfg.Decider.Open(c)
	if err != nil {
		r.count.undecided.Add(1)
		return nil, fmt.Errorf("decide connection: %w", err)
	}
	return session, nil
}
