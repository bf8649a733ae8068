package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/proxy/h1"
	"ringfence.dev/proxy/socket"
	"ringfence.dev/proxy/tunnel"
)

// Scope is one namespace being relayed for.
type Scope struct {
	relay     *Relay
	name      string
	network   Network
	listeners []listener
	// The filter's configurations, one for each mode.
	enforce, dryRun, observe, passive h1.Config

	mode atomic.Uint32

	// mu held means links and tunnels are complete: nothing is added once draining.
	mu       sync.Mutex
	links    map[*link]struct{}
	tunnels  map[*tunnel.Conn]struct{}
	draining bool // nothing is accepted any more
	cut      bool // nothing lives on
	serving  bool
	stop     context.CancelFunc // ends what is being set up; nil before Serve
	ended    chan struct{}      // closed when Serve has returned
	work     sync.WaitGroup     // connections and their setup
	changed  *sync.Cond         // links became fewer
}

type listener struct {
	*socket.Listener
	serve func(ctx context.Context, a socket.Accepted) *link
	count *atomic.Uint64
}

func (r *Relay) newScope(c ScopeConfig) (*Scope, error) {
	s := &Scope{
		relay: r, name: c.Name, network: c.Network,
		links: make(map[*link]struct{}), tunnels: make(map[*tunnel.Conn]struct{}),
		ended: make(chan struct{}),
	}
	s.changed = sync.NewCond(&s.mu)
	s.mode.Store(uint32(c.Mode))
	s.enforce = r.cfg.HTTP
	s.enforce.Strip = strip
	s.dryRun, s.observe, s.passive = s.enforce, s.enforce, s.enforce
	s.enforce.Mode, s.dryRun.Mode = h1.Enforce, h1.DryRun
	s.observe.Mode, s.passive.Mode = h1.Observe, h1.Passive
	for _, group := range []struct {
		fds   []int
		serve func(context.Context, socket.Accepted) *link
		count *atomic.Uint64
	}{
		{c.Outbound, s.serveOutbound, &r.count.outbound},
		{c.Inbound, s.serveInbound, &r.count.inbound},
		{c.Tunnel, s.serveTunnel, &r.count.tunnels},
	} {
		for _, fd := range group.fds {
			l, err := socket.Listen(fd, r.cfg.timeouts())
			if err != nil {
				s.closeListeners()
				return nil, err
			}
			s.listeners = append(s.listeners, listener{l, group.serve, group.count})
		}
	}
	return s, nil
}

// Name is the scope's name.
func (s *Scope) Name() string { return s.name }

// Mode is the scope's current mode.
func (s *Scope) Mode() authz.Mode { return authz.Mode(s.mode.Load()) }

// Serve accepts connections until ctx ends, which cuts everything, or until
// Drain. It returns when all that it started is gone. It is called once.
func (s *Scope) Serve(ctx context.Context) error {
	s.mu.Lock()
	if s.serving {
		s.mu.Unlock()
		return fmt.Errorf("proxy: scope %s: Serve called twice", s.name)
	}
	s.serving = true
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.stop = cancel
	s.mu.Unlock()
	defer close(s.ended)
	// The end of ctx closes the listeners, which ends the loops below.
	stop := context.AfterFunc(ctx, func() { s.cutAll(); s.closeListeners() })
	defer stop()
	var loops sync.WaitGroup
	for i := range s.listeners {
		loops.Go(func() { s.accept(ctx, &s.listeners[i]) })
	}
	ticks := make(chan struct{})
	loops.Go(func() { s.tick(ticks) })
	s.work.Add(1)
	go func() { // while listeners live, so that work never drops to zero too soon
		defer s.work.Done()
		s.awaitDraining()
	}()
	s.work.Wait()
	close(ticks)
	s.closeListeners()
	loops.Wait()
	s.relay.remove(s)
	return nil
}

func (s *Scope) awaitDraining() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.draining {
		s.changed.Wait()
	}
}

func (s *Scope) closeListeners() {
	for _, l := range s.listeners {
		_ = l.Close()
	}
}

// Accepting again at once when descriptors have run out would only spin; the
// pause grows to a second, and the queue in the kernel holds what comes meanwhile.
const (
	minPause = 5 * time.Millisecond
	maxPause = time.Second
)

func (s *Scope) accept(ctx context.Context, l *listener) {
	pause := minPause
	for {
		a, err := l.Accept()
		switch {
		case err == nil:
			pause = minPause
			l.count.Add(1)
			s.admit(ctx, a, l.serve)
		case errors.Is(err, socket.ErrClosed):
			return
		default:
			s.relay.count.acceptErrors.Add(1)
			if socket.Exhausted(err) {
				s.relay.count.exhausted.Add(1)
			}
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
			pause = min(2*pause, maxPause)
		}
	}
}

// admit starts a connection's goroutine, unless the relay is full or stopping.
func (s *Scope) admit(ctx context.Context, a socket.Accepted, serve func(context.Context, socket.Accepted) *link) {
	live := s.relay.count.live.Add(1)
	s.mu.Lock()
	if s.draining || live > int64(s.relay.cfg.MaxConnections) {
		s.mu.Unlock()
		s.relay.count.live.Add(-1)
		s.relay.count.shed.Add(1)
		socket.ResetFD(a.FD)
		return
	}
	s.work.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.work.Done()
		defer s.relay.count.live.Add(-1)
		if l := serve(ctx, a); l != nil {
			l.run()
		}
	}()
}

// captured asks where an accepted connection was going. One that nobody knows
// anything of is reset, and the returned socket is nil.
func (s *Scope) captured(d flow.Direction, a socket.Accepted) (*socket.Conn, flow.Flow) {
	local, err := socket.LocalAddr(a.FD)
	var f flow.Flow
	if err == nil {
		f, err = s.network.Origin(d, a.FD, local, a.Remote)
	}
	if err != nil {
		s.relay.count.noOrigin.Add(1)
		socket.ResetFD(a.FD)
		return nil, flow.Flow{}
	}
	client, err := socket.New(a.FD)
	if err != nil {
		s.relay.count.failed.Add(1)
		return nil, flow.Flow{}
	}
	f.Scope, f.Direction = s.name, d
	f.Source, f.Destination = unmap(f.Source), unmap(f.Destination)
	return client, f
}

// enter puts a link into the table, or reports false when the scope is stopping.
func (s *Scope) enter(l *link) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cut {
		return false
	}
	s.links[l] = struct{}{}
	return true
}

func (s *Scope) leave(l *link) {
	s.mu.Lock()
	delete(s.links, l)
	s.changed.Broadcast()
	s.mu.Unlock()
}

func (s *Scope) live() []*link {
	s.mu.Lock()
	defer s.mu.Unlock()
	links := make([]*link, 0, len(s.links))
	for l := range s.links {
		links = append(links, l)
	}
	return links
}

func (s *Scope) servers() []*tunnel.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	conns := make([]*tunnel.Conn, 0, len(s.tunnels))
	for t := range s.tunnels {
		conns = append(conns, t)
	}
	return conns
}

// Drain stops accepting, lets live connections finish until ctx ends, and
// resets the rest. It returns when Serve is about to.
func (s *Scope) Drain(ctx context.Context) {
	stop := context.AfterFunc(ctx, s.cutAll)
	defer stop()
	s.mu.Lock()
	s.draining = true
	s.changed.Broadcast()
	serving := s.serving
	s.mu.Unlock()
	s.closeListeners()
	for _, t := range s.servers() {
		t.GoAway()
	}
	if !serving {
		s.relay.remove(s)
		return
	}
	<-s.ended
}

// errStopped is why links end that outlive the grace they were given.
var errStopped = errors.New("agent is stopping")

func (s *Scope) cutAll() {
	s.mu.Lock()
	s.draining, s.cut = true, true
	if s.stop != nil {
		s.stop()
	}
	s.changed.Broadcast()
	s.mu.Unlock()
	for _, l := range s.live() {
		l.abort(errStopped)
	}
	for _, t := range s.servers() {
		t.Close()
	}
}

func (s *Scope) retire(id spiffeid.ID) {
	for _, t := range s.servers() {
		if shown, _ := t.Shown(); shown == id {
			t.GoAway()
		}
	}
}

// SetMode changes the mode. Entering enforce decides every live connection
// again under it, and resets those that are not permitted.
func (s *Scope) SetMode(m authz.Mode) {
	if authz.Mode(s.mode.Swap(uint32(m))) == m {
		return
	}
	for _, l := range s.live() {
		l.setMode(m)
	}
}

func (s *Scope) reevaluate() (cut int) {
	for _, l := range s.live() {
		if l.reevaluate() {
			cut++
		}
	}
	return cut
}

// tickInterval is how often silent half-closed links are looked for.
const tickInterval = 10 * time.Second

func (s *Scope) tick(stop <-chan struct{}) {
	ticker := time.NewTicker(tickInterval)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-ticker.C:
			s.relay.pool.Sweep(now)
			for _, l := range s.live() {
				l.tick(tickInterval)
			}
		}
	}
}

// own reports whether to is one of the agent's own listeners in this scope.
func (s *Scope) own(to netip.AddrPort) bool {
	return agentPort(to.Port()) && s.network.Local(to.Addr())
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
