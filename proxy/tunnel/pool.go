package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Key names the tunnels that may carry a connection. Nothing is ever shared
// across keys: the source's identity, the namespace it dials from and the
// workload it wants are all in it.
type Key struct {
	Scope  string
	Source spiffeid.ID
	// To is the address and port of the workload; the tunnel itself goes to Port.
	To netip.AddrPort
	// Device and Bound are what the caller's socket was bound to.
	Device uint32
	Bound  netip.Addr
}

// PoolConfig sets up a Pool. Zero fields have defaults.
type PoolConfig struct {
	// Dial makes a connected tunnel for key, showing cert, within ctx. Run is not called yet.
	Dial func(ctx context.Context, key Key, cert *tls.Certificate) (*Conn, error)
	// DialTimeout bounds Dial and the wait for the peer's settings. Zero means 10 s.
	DialTimeout time.Duration
	// Streams is the most streams of ours in one tunnel. Zero means 100, as other HBONE peers use.
	Streams int
	// Unused is how long a tunnel without streams is kept. Zero means 5 min.
	Unused time.Duration
	// Retired is how long the streams of a tunnel may go on after its leaf was
	// replaced. Zero means 24 h.
	Retired time.Duration
	// Max bounds the tunnels. Past it a dial fails with ErrFull. Zero means 16,384.
	Max int
}

var (
	// ErrFull reports a pool at its bound.
	ErrFull = errors.New("tunnel: too many tunnels")
	// ErrPoolClosed reports use of a pool after Close.
	ErrPoolClosed = errors.New("tunnel: pool is closed")
)

// Pool keeps the client ends of tunnels for reuse.
type Pool struct {
	cfg PoolConfig

	// mu held means conns, dials and total agree.
	mu      sync.Mutex
	keys    map[Key]*entry
	total   int // tunnels and dials
	closed  bool
	ctx     context.Context // cancelled by Close, for dials under way
	cancel  context.CancelFunc
	running sync.WaitGroup
	retired []*member // no new streams; live until their streams or time end
	dialled uint64
}

type entry struct {
	conns []*member
	dial  *dial // at most one at a time: its waiters share the outcome
}

type member struct {
	*Conn
	key     Key
	unused  time.Time // since when; zero while in use
	retired time.Time // zero: not
}

type dial struct {
	done chan struct{}
	err  error
}

// NewPool makes an empty pool. Close ends it.
func NewPool(c PoolConfig) *Pool {
	c.DialTimeout = orDefault(c.DialTimeout, 10*time.Second)
	c.Streams = orDefault(c.Streams, 100)
	c.Unused = orDefault(c.Unused, 5*time.Minute)
	c.Retired = orDefault(c.Retired, 24*time.Hour)
	c.Max = orDefault(c.Max, 16384)
	ctx, cancel := context.WithCancel(context.Background())
	return &Pool{cfg: c, keys: make(map[Key]*entry), ctx: ctx, cancel: cancel}
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

// Get returns a tunnel for key with a slot reserved on it: the caller calls
// Open or Unreserve. It dials when there is none, once for all who wait. A
// tunnel that shows another certificate than cert is retired.
func (p *Pool) Get(ctx context.Context, key Key, cert *tls.Certificate) (*Conn, error) {
	for {
		conn, d, err := p.take(key, cert)
		if conn != nil || err != nil {
			return conn, err
		}
		select {
		case <-d.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if d.err != nil {
			return nil, d.err
		}
		// With more waiters than slots, the rest go round again for another tunnel.
	}
}

// take finds a tunnel with a free slot, or the dial to wait for.
func (p *Pool) take(key Key, cert *tls.Certificate) (*Conn, *dial, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, nil, ErrPoolClosed
	}
	e := p.keys[key]
	if e == nil {
		e = &entry{}
		p.keys[key] = e
	}
	for i := 0; i < len(e.conns); {
		m := e.conns[i]
		if m.Conn.Certificate() != cert {
			p.retireLocked(m)
			continue
		}
		switch err := m.Reserve(p.cfg.Streams); {
		case err == nil:
			m.unused = time.Time{}
			return m.Conn, nil, nil
		case errors.Is(err, ErrDraining):
			p.retireLocked(m)
		default:
			i++
		}
	}
	if e.dial == nil {
		if p.total >= p.cfg.Max {
			p.forgetLocked(key, e)
			return nil, nil, ErrFull
		}
		e.dial = &dial{done: make(chan struct{})}
		p.total++
		p.running.Add(1)
		go p.connect(key, cert, e.dial)
	}
	return nil, e.dial, nil
}

// connect runs one dial and then the tunnel that came of it. It does not end
// with the first caller's patience, since others wait for it too.
func (p *Pool) connect(key Key, cert *tls.Certificate, d *dial) {
	defer p.running.Done()
	ctx, cancel := context.WithTimeout(p.ctx, p.cfg.DialTimeout)
	defer cancel()
	conn, err := p.cfg.Dial(ctx, key, cert)
	if err != nil {
		p.settle(key, d, nil, err)
		return
	}
	m := &member{Conn: conn, key: key, unused: time.Now()}
	p.running.Add(1)
	go func() {
		defer p.running.Done()
		_ = conn.Run() // why it ended reaches the streams
		p.remove(m)
	}()
	select {
	case <-conn.Ready():
	case <-conn.Done():
		err = fmt.Errorf("tunnel to %s: %w: %w", key.To, ErrRejected, conn.Err())
	case <-ctx.Done():
		err = fmt.Errorf("tunnel to %s: no settings: %w", key.To, ctx.Err())
	}
	if err != nil {
		conn.Close()
		p.settle(key, d, nil, err)
		return
	}
	p.settle(key, d, m, nil)
}

// ErrRejected reports a peer that ended the tunnel before it was of use,
// usually because it does not accept our certificate.
var ErrRejected = errors.New("tunnel: peer refused the tunnel")

// settle ends a dial and lets its waiters look again.
func (p *Pool) settle(key Key, d *dial, m *member, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d.err = err
	e := p.keys[key]
	e.dial = nil
	switch {
	case m == nil:
		p.total--
	case p.closed:
		m.Conn.Close()
		d.err = ErrPoolClosed
		p.total--
	case isClosed(m.Conn.Done()):
		d.err = fmt.Errorf("tunnel to %s: %w: %w", key.To, ErrRejected, m.Conn.Err())
		p.total--
	case !m.Conn.takesStreams():
		// Trying again would only make another such tunnel.
		m.Conn.Close()
		d.err = fmt.Errorf("tunnel to %s: %w: peer allows no streams", key.To, ErrRejected)
		p.total--
	default:
		e.conns = append(e.conns, m)
		p.dialled++
	}
	p.forgetLocked(key, e)
	close(d.done)
}

func isClosed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

func (p *Pool) forgetLocked(key Key, e *entry) {
	if len(e.conns) == 0 && e.dial == nil {
		delete(p.keys, key)
	}
}

// remove takes a tunnel that has ended out of the pool.
func (p *Pool) remove(m *member) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.retired, m); i >= 0 {
		p.retired = slices.Delete(p.retired, i, i+1)
		p.total--
		return
	}
	e := p.keys[m.key]
	if e == nil {
		return
	}
	if i := slices.Index(e.conns, m); i >= 0 {
		e.conns = slices.Delete(e.conns, i, i+1)
		p.total--
		p.forgetLocked(m.key, e)
	}
}

// retireLocked lets a tunnel take no new streams and end with its last one.
func (p *Pool) retireLocked(m *member) {
	e := p.keys[m.key]
	e.conns = slices.DeleteFunc(e.conns, func(o *member) bool { return o == m })
	m.retired = time.Now()
	p.retired = append(p.retired, m)
	m.GoAway()
}

// Retire retires the tunnels that show a certificate of id.
func (p *Pool) Retire(id spiffeid.ID) {
	p.retireIf(func(m *member) bool { return m.key.Source == id })
}

// RetireScope retires the tunnels of a scope that is going away.
func (p *Pool) RetireScope(scope string) {
	p.retireIf(func(m *member) bool { return m.key.Scope == scope })
}

// GoAway retires every tunnel.
func (p *Pool) GoAway() { p.retireIf(func(*member) bool { return true }) }

func (p *Pool) retireIf(match func(*member) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, e := range p.keys {
		for _, m := range slices.Clone(e.conns) {
			if match(m) {
				p.retireLocked(m)
			}
		}
		p.forgetLocked(key, e)
	}
}

// Sweep releases tunnels that have been unused too long and cuts retired ones
// whose time is over. The owner calls it every few seconds to minutes.
func (p *Pool) Sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, e := range p.keys {
		for _, m := range slices.Clone(e.conns) {
			switch {
			case m.Streams() > 0:
				m.unused = time.Time{}
			case m.unused.IsZero():
				m.unused = now
			case now.Sub(m.unused) >= p.cfg.Unused:
				p.retireLocked(m)
			}
		}
		p.forgetLocked(key, e)
	}
	for _, m := range p.retired {
		if now.Sub(m.retired) >= p.cfg.Retired {
			m.Conn.Close()
		}
	}
}

// Close ends every tunnel at once and waits for what the pool started. It may
// be called twice.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	p.cancel()
	for _, e := range p.keys {
		for _, m := range e.conns {
			m.Conn.Close()
		}
	}
	for _, m := range p.retired {
		m.Conn.Close()
	}
	p.mu.Unlock()
	p.running.Wait()
}

// Info describes one tunnel.
type Info struct {
	Scope   string         `json:"scope"`
	Source  string         `json:"source"`
	To      netip.AddrPort `json:"to"`
	Peer    string         `json:"peer"`
	Streams int            `json:"streams"`
	Unread  int64          `json:"unread_bytes"`
	Retired bool           `json:"retired,omitempty"`
	Stats
}

// Tunnels describes the tunnels in the pool.
func (p *Pool) Tunnels() []Info {
	p.mu.Lock()
	defer p.mu.Unlock()
	var infos []Info
	for _, e := range p.keys {
		for _, m := range e.conns {
			infos = append(infos, m.info())
		}
	}
	for _, m := range p.retired {
		infos = append(infos, m.info())
	}
	return infos
}

func (m *member) info() Info {
	return Info{
		Scope: m.key.Scope, Source: m.key.Source.String(), To: m.key.To, Peer: m.Peer().String(),
		Streams: m.Streams(), Unread: m.Unread(), Retired: !m.retired.IsZero(), Stats: m.Stats(),
	}
}

// Dialled is how many tunnels were made, ever.
func (p *Pool) Dialled() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dialled
}
