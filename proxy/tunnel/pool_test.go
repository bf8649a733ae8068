package tunnel_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ringfence.dev/proxy/proxytest"
	"ringfence.dev/proxy/tunnel"
)

// poolOf is a pool whose dials lead to servers of the test's own.
type poolOf struct {
	*tunnel.Pool
	tb    testing.TB
	ca    *proxytest.CA
	dials atomic.Int64
	gate  chan struct{} // dials wait for it; nil: they do not
	fail  atomic.Pointer[error]

	mu      sync.Mutex
	servers []*server
}

func newPool(tb testing.TB, cfg tunnel.PoolConfig) *poolOf {
	p := &poolOf{tb: tb, ca: proxytest.NewCA(tb, "lab.test")}
	cfg.Dial = p.dial
	p.Pool = tunnel.NewPool(cfg)
	tb.Cleanup(p.Pool.Close)
	return p
}

func (p *poolOf) dial(ctx context.Context, key tunnel.Key, cert *tls.Certificate) (*tunnel.Conn, error) {
	p.dials.Add(1)
	if p.gate != nil {
		select {
		case <-p.gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err := p.fail.Load(); err != nil {
		return nil, *err
	}
	cs, ss := sockets(p.tb)
	s := newServer()
	s.serve(p.tb, ss, p.ca)
	p.mu.Lock()
	p.servers = append(p.servers, s)
	p.mu.Unlock()
	return tunnel.Client(cs, tunnel.ClientConfig{
		Certificate: cert, Verify: p.ca.Verify, Port: key.To.Port(), Deadline: time.Now().Add(patience),
	})
}

func (p *poolOf) get(key tunnel.Key) *tunnel.Conn {
	p.tb.Helper()
	cert, _ := p.ca.Certificate(context.Background(), key.Source)
	c, err := p.Get(context.Background(), key, cert)
	if err != nil {
		p.tb.Fatal(err)
	}
	return c
}

func keyTo(port uint16) tunnel.Key {
	return tunnel.Key{Scope: "s", Source: clientID, To: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port)}
}

func TestPoolSharesWithinAKeyOnly(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{})
	c := p.get(keyTo(80))
	if p.get(keyTo(80)) != c {
		t.Error("a second tunnel for the same key")
	}
	others := []tunnel.Key{keyTo(81), keyTo(80), keyTo(80), keyTo(80), keyTo(80)}
	others[1].Scope = "other"
	others[2].Source = serverID
	others[3].Device = 3
	others[4].Bound = netip.MustParseAddr("192.0.2.9")
	for _, k := range others {
		if p.get(k) == c {
			t.Errorf("shared with %+v", k)
		}
	}
	if n := len(p.Tunnels()); n != 6 || p.Dialled() != 6 {
		t.Errorf("%d tunnels of %d dialled", n, p.Dialled())
	}
}

func TestPoolDialsOnceForMany(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{Streams: 100})
	p.gate = make(chan struct{})
	var wg sync.WaitGroup
	var conns sync.Map
	for range 100 {
		wg.Go(func() { conns.Store(p.get(keyTo(80)), true) })
	}
	for p.dials.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	close(p.gate)
	wg.Wait()
	if n := p.dials.Load(); n != 1 {
		t.Errorf("%d dials for one hundred waiters", n)
	}
}

func TestPoolOpensAnotherWhenFull(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{Streams: 10})
	var wg sync.WaitGroup
	for range 35 {
		wg.Go(func() { p.get(keyTo(80)) })
	}
	wg.Wait()
	if n := len(p.Tunnels()); n != 4 {
		t.Errorf("%d tunnels for 35 streams, ten each", n)
	}
}

func TestPoolDialFailureReachesAllWaiters(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{})
	p.gate = make(chan struct{})
	want := errors.New("no way there")
	p.fail.Store(&want)
	cert, _ := p.ca.Certificate(t.Context(), clientID)
	errs := make(chan error, 10)
	for range cap(errs) {
		go func() { _, err := p.Get(context.Background(), keyTo(80), cert); errs <- err }()
	}
	for p.dials.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	close(p.gate)
	for range cap(errs) {
		if err := <-errs; !errors.Is(err, want) {
			t.Errorf("Get = %v", err)
		}
	}
	p.fail.Store(nil)
	p.get(keyTo(80)) // a failure is not remembered
}

// One waiter's patience does not end the dial for the others.
func TestPoolWaiterGivesUpAlone(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{})
	p.gate = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	cert, _ := p.ca.Certificate(t.Context(), clientID)
	first := make(chan error)
	go func() { _, err := p.Get(ctx, keyTo(80), cert); first <- err }()
	for p.dials.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("Get = %v", err)
	}
	close(p.gate)
	p.get(keyTo(80))
	if n := p.dials.Load(); n != 1 {
		t.Errorf("%d dials", n)
	}
}

func TestPoolRejectedCertificateIsAnError(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{})
	foreign := proxytest.NewCA(t, "lab.test").Issue(proxytest.Leaf{})
	if _, err := p.Get(t.Context(), keyTo(80), foreign); !errors.Is(err, tunnel.ErrRejected) {
		t.Errorf("Get = %v, want ErrRejected", err)
	}
	if n := len(p.Tunnels()); n != 0 {
		t.Errorf("%d tunnels are kept", n)
	}
}

func TestPoolBound(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{Max: 2})
	p.get(keyTo(1))
	p.get(keyTo(2))
	cert, _ := p.ca.Certificate(t.Context(), clientID)
	if _, err := p.Get(t.Context(), keyTo(3), cert); !errors.Is(err, tunnel.ErrFull) {
		t.Errorf("Get past the bound: %v", err)
	}
}

// After a leaf was replaced no new stream goes into its tunnel; the live one goes on.
func TestPoolRetiresReplacedLeaf(t *testing.T) {
	for name, retire := range map[string]func(*poolOf){
		"at the next Get": func(p *poolOf) { p.ca.Renew(clientID) },
		"when told":       func(p *poolOf) { p.ca.Renew(clientID); p.Retire(clientID) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, tunnel.PoolConfig{})
			old := p.get(keyTo(80))
			k := newSink()
			st, err := old.Open(&tunnel.Request{Authority: "192.0.2.1:80"}, k)
			if err != nil {
				t.Fatal(err)
			}
			k.setStream(st)
			k.wait(t, "the answer", func() bool { return k.status == 200 })
			retire(p)
			fresh := p.get(keyTo(80))
			if fresh == old {
				t.Fatal("the old tunnel is still given out")
			}
			fresh.Unreserve()
			if err := st.WriteAll([][]byte{[]byte("x")}); err != nil {
				t.Errorf("the live stream: %v", err)
			}
			infos := p.Tunnels()
			if len(infos) != 2 || infos[0].Retired == infos[1].Retired {
				t.Errorf("tunnels = %+v", infos)
			}
			st.Close()
			<-old.Done()
		})
	}
}

func TestPoolCutsRetiredInTheEnd(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{Retired: time.Hour})
	c := p.get(keyTo(80))
	k := newSink()
	if _, err := c.Open(&tunnel.Request{Authority: "192.0.2.1:80"}, k); err != nil {
		t.Fatal(err)
	}
	p.Retire(clientID)
	p.Sweep(time.Now().Add(59 * time.Minute))
	if isDone(c) {
		t.Error("cut before its time")
	}
	p.Sweep(time.Now().Add(61 * time.Minute))
	k.wait(t, "the cut", func() bool { return k.reset != nil })
}

func isDone(c *tunnel.Conn) bool {
	select {
	case <-c.Done():
		return true
	default:
		return false
	}
}

func TestPoolReleasesUnused(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{Unused: time.Minute})
	c := p.get(keyTo(80))
	c.Unreserve()
	now := time.Now()
	p.Sweep(now)
	p.Sweep(now.Add(59 * time.Second))
	if isDone(c) {
		t.Error("released too early")
	}
	p.Sweep(now.Add(2 * time.Minute))
	select {
	case <-c.Done():
	case <-time.After(patience):
		t.Fatal("not released")
	}
}

func TestPoolReplacesDeadTunnel(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{})
	c := p.get(keyTo(80))
	p.servers[0].await()
	p.servers[0].Close()
	<-c.Done()
	if p.get(keyTo(80)) == c {
		t.Error("a dead tunnel was given out")
	}
}

func TestPoolClosed(t *testing.T) {
	p := newPool(t, tunnel.PoolConfig{})
	c := p.get(keyTo(80))
	p.Close()
	if !isDone(c) {
		t.Error("a tunnel outlives the pool")
	}
	cert, _ := p.ca.Certificate(t.Context(), clientID)
	if _, err := p.Get(t.Context(), keyTo(80), cert); !errors.Is(err, tunnel.ErrPoolClosed) {
		t.Errorf("Get = %v", err)
	}
}
