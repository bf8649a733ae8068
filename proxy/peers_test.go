package proxy_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/proxytest"
	"ringfence.dev/proxy/tunnel"
)

// bare is a host without an agent.
func bare(tb testing.TB) *host {
	return &host{tb: tb, net: proxytest.NewNetwork(tb, hostIP()), who: proxytest.NewIdentifier()}
}

func caller(tb testing.TB, mode authz.Mode, policy proxytest.Policy, pins map[netip.Addr]string) *host {
	a := newHost(tb, proxytest.NewCA(tb, "lab.test"), hostConfig{mode: mode, policy: policy, pins: pins})
	a.who.SetCaller(uid, who("a/sa/caller"))
	return a
}

func TestPeerWithoutAgent(t *testing.T) {
	a, b := caller(t, authz.Enforce, proxytest.Policy{}, nil), bare(t)
	to := b.service(t, "b/sa/echo", echo)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { exchange(t, a.dial(t, to), "in clear") })
	}
	wg.Wait()
	if n := a.relay.Stats().Probes; n != 1 {
		t.Errorf("%d probes for one peer", n)
	}
	if !a.dec.Logged("mesh=false: permit") {
		t.Errorf("log = %q", a.dec.Log())
	}
	if infos := a.relay.Peers(); len(infos) != 1 || infos[0].State != "none" {
		t.Errorf("peers = %+v", infos)
	}
}

// Silence on the tunnel's port is no proof of anything: enforce refuses.
func TestSilentPeer(t *testing.T) {
	a, b := caller(t, authz.Enforce, proxytest.Policy{}, nil), bare(t)
	to := forbidden(t, b, "b/sa/svc")
	full(t, b)
	start := time.Now()
	a.denied(t, to)
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("the probe took %v", d)
	}
	if !a.dec.Logged("refuse: no carrier") {
		t.Errorf("log = %q", a.dec.Log())
	}
	// Dry-run goes on in clear, and says so.
	a = caller(t, authz.DryRun, proxytest.Policy{}, nil)
	exchange(t, a.dial(t, b.service(t, "b/sa/echo", echo)), "in clear")
	if !a.dec.Logged("would_deny") {
		t.Errorf("log = %q", a.dec.Log())
	}
}

// full makes a host's tunnel port one that neither accepts nor refuses: a
// listener whose queue is full drops further SYNs.
func full(t *testing.T, h *host) {
	t.Helper()
	addr := silentListener(t, h.net.IP)
	for range 20 {
		d := net.Dialer{Timeout: 100 * time.Millisecond}
		c, err := d.Dial("tcp", addr.String())
		if err != nil {
			return
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the queue does not fill")
}

// A peer that has once spoken HBONE gets no plaintext, until an operator says so.
func TestAgentGoneIsNoDowngrade(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	exchange(t, a.dial(t, to), "in a tunnel")
	b.relay.Close()
	<-b.served
	b.net.CloseListeners()
	a.denied(t, to)
	a.denied(t, to)
	a.relay.ClearPeer(b.net.IP)
	exchange(t, a.dial(t, to), "in clear")
}

func TestPins(t *testing.T) {
	ca := proxytest.NewCA(t, "lab.test")
	b := newHost(t, ca, hostConfig{mode: authz.Enforce})
	to := b.service(t, "b/sa/echo", echo)
	for pin, ok := range map[string]bool{
		"spiffe://lab.test/ns/b/sa/echo": true, "spiffe://lab.test/ns/b": true, "spiffe://lab.test/ns/b/": true,
		"spiffe://lab.test": true, "spiffe://lab.test/ns/b/sa/ech": false, "spiffe://lab.test/ns/c": false, "spiffe://lab.testament": false,
	} {
		a := newHost(t, ca, hostConfig{mode: authz.Enforce, pins: map[netip.Addr]string{b.net.IP: pin}})
		a.who.SetCaller(uid, who("a/sa/caller"))
		a.net.SetMesh(false) // a pin says more
		if ok {
			exchange(t, a.dial(t, to), "pinned")
		} else {
			a.denied(t, to)
		}
		if a.relay.Stats().Probes != 0 {
			t.Error("a pinned peer was probed")
		}
	}
	// Pinned, and there is no agent: no plaintext.
	c := bare(t)
	a := caller(t, authz.Enforce, proxytest.Policy{}, map[netip.Addr]string{c.net.IP: "spiffe://lab.test/ns/c"})
	a.denied(t, forbidden(t, c, "c/sa/svc"))
}

func TestChangedIdentityIsRefused(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	one, two := b.service(t, "b/sa/one", echo), b.service(t, "b/sa/two", echo)
	exchange(t, a.dial(t, one), "known")
	exchange(t, a.dial(t, two), "another workload of the same host")
	three := forbidden(t, b, "evil/sa/three")
	a.denied(t, three)
	a.relay.ClearPeer(b.net.IP)
	b.service(t, "unused", echo)
	a.denied(t, netip.AddrPortFrom(b.net.IP, 1)) // learns nothing
	if infos := a.relay.Peers(); len(infos) > 1 {
		t.Errorf("peers = %+v", infos)
	}
}

func TestPeerTableIsBounded(t *testing.T) {
	a := newHost(t, proxytest.NewCA(t, "lab.test"), hostConfig{mode: authz.Enforce, tune: tunePeers(3)})
	a.who.SetCaller(uid, who("a/sa/caller"))
	for range 10 {
		exchange(t, a.dial(t, bare(t).service(t, "x/sa/echo", echo)), "in clear")
	}
	if n := len(a.relay.Peers()); n > 3 {
		t.Errorf("%d peers remembered", n)
	}
}

// A foreign HBONE peer: no SNI, no decision header, own habits.
type foreign struct {
	tb  testing.TB
	tls *tls.Conn
	fr  *http2.Framer
}

func newForeign(tb testing.TB, b *host, from string, name string) *foreign {
	tb.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.Dial("tcp", b.tunnel.String())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	cert, _ := b.ca.Certificate(context.Background(), who("z/sa/ztunnel").ID)
	f := &foreign{tb: tb, tls: tls.Client(c, &tls.Config{
		Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}, InsecureSkipVerify: true, ServerName: name,
	})}
	f.fr = http2.NewFramer(f.tls, f.tls)
	f.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(f.tls, http2.ClientPreface); err != nil {
		tb.Fatal(err)
	}
	if err := f.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 4 << 20}); err != nil {
		tb.Fatal(err)
	}
	return f
}

func (f *foreign) request(id uint32, fields ...string) string {
	f.tb.Helper()
	var b strings.Builder
	enc := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	if err := f.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte(b.String()), EndHeaders: true}); err != nil {
		f.tb.Fatal(err)
	}
	for {
		fr, err := f.fr.ReadFrame()
		if err != nil {
			f.tb.Fatal(err)
		}
		if h, ok := fr.(*http2.MetaHeadersFrame); ok && h.StreamID == id {
			return h.PseudoValue("status")
		}
	}
}

func TestForeignPeer(t *testing.T) {
	_, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	f := newForeign(t, b, "127.0.0.9", "")
	if got := f.request(1, ":method", "CONNECT", ":authority", to.String(), "baggage", "k8s.cluster.name=x"); got != "200" {
		t.Fatalf("status %s", got)
	}
	if got := f.tls.ConnectionState().PeerCertificates[0].URIs[0].String(); got != "spiffe://lab.test/ns/b/sa/node" {
		t.Errorf("without SNI it is shown %s", got)
	}
	if err := f.fr.WriteData(1, true, []byte("hi")); err != nil {
		t.Fatal(err)
	}
	for {
		fr, err := f.fr.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if d, ok := fr.(*http2.DataFrame); ok && len(d.Data()) > 0 {
			if string(d.Data()) != "hi" {
				t.Errorf("echo is %q", d.Data())
			}
			break
		}
	}
}

func TestConnectElsewhereIsRefused(t *testing.T) {
	_, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	f := newForeign(t, b, "127.0.0.9", "")
	id := uint32(1)
	for authority, want := range map[string]string{
		"127.0.0.1:22":               "400", // another address than the connection's own
		"192.0.2.1:80":               "400",
		"[::1]:80":                   "400",
		"web.shop.svc:80":            "400",
		b.net.IP.String():            "400",
		b.net.IP.String() + ":0":     "400",
		b.net.IP.String() + ":99999": "400",
		"user@" + to.String():        "400",
		b.tunnel.String():            "503", // the agent's own port
		b.net.IP.String() + ":15001": "503",
		b.net.IP.String() + ":1":     "503", // nobody there
		to.String():                  "200",
		"[::ffff:" + to.Addr().String() + "]:" + portOf(to): "200",
	} {
		if got := f.request(id, ":method", "CONNECT", ":authority", authority); got != want {
			t.Errorf("CONNECT %s: %s, want %s", authority, got, want)
		}
		id += 2
	}
	if got := f.request(id, ":method", "GET", ":scheme", "https", ":path", "/", ":authority", to.String()); got != "400" {
		t.Errorf("GET: %s", got)
	}
	for _, d := range b.net.Dials() {
		if d.To != to {
			t.Errorf("dialled %v", d.To)
		}
	}
}

func portOf(a netip.AddrPort) string { return a.String()[strings.LastIndexByte(a.String(), ':')+1:] }

// A tunnel made to one port does not carry to another, where policy at the
// caller has not seen the service.
func TestTunnelIsForItsPort(t *testing.T) {
	_, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	one, two := b.service(t, "b/sa/one", echo), forbidden(t, b, "b/sa/two")
	f := newForeign(t, b, "127.0.0.9", tunnel.ServerName(one.Port()))
	if got := f.tls.ConnectionState().PeerCertificates[0].URIs[0].String(); got != "spiffe://lab.test/ns/b/sa/one" {
		t.Errorf("shown %s", got)
	}
	if got := f.request(1, ":method", "CONNECT", ":authority", two.String()); got != "400" {
		t.Errorf("another port: %s", got)
	}
	b.who.SetOwner(one.Port(), who("b/sa/successor"))
	if got := f.request(3, ":method", "CONNECT", ":authority", one.String()); got != "503" {
		t.Errorf("another owner: %s", got)
	}
}

// An agent can name its workload's port, but no address other than its own; and
// only a well-formed decision id is taken over.
func TestForwardedAndDecision(t *testing.T) {
	_, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	f := newForeign(t, b, "127.0.0.9", "")
	id := uint32(1)
	for forwarded, want := range map[string]string{
		`for="127.0.0.9:4242"`: "127.0.0.9:4242", `for="127.0.0.9:4243";host=x`: "127.0.0.9:4243",
		`for="10.0.0.1:1"`: "127.0.0.9:", `for=127.0.0.9:1`: "127.0.0.9:", `for="nonsense"`: "127.0.0.9:", "": "127.0.0.9:",
	} {
		fields := []string{":method", "CONNECT", ":authority", to.String()}
		if forwarded != "" {
			fields = append(fields, "forwarded", forwarded)
		}
		if got := f.request(id, fields...); got != "200" {
			t.Fatalf("status %s", got)
		}
		id += 2
		dials := b.net.Dials()
		if got := dials[len(dials)-1].Client.String(); !strings.HasPrefix(got, want) || got == "127.0.0.9:1" {
			t.Errorf("forwarded %q: the server sees %s", forwarded, got)
		}
	}
	want := authz.NewID().String()
	f.request(id, ":method", "CONNECT", ":authority", to.String(), "ringfence-decision", want)
	f.request(id+2, ":method", "CONNECT", ":authority", to.String(), "ringfence-decision", want+"-3")
	f.request(id+4, ":method", "CONNECT", ":authority", to.String(), "ringfence-decision", "<script>")
	eventually(t, "the connections", func() bool { return len(b.relay.Connections()) >= 9 })
	n := 0
	for _, c := range b.relay.Connections() {
		if c.ID.String() == want {
			n++
		}
		if c.ID.IsZero() {
			t.Error("a connection without an id")
		}
	}
	if n != 1 {
		t.Errorf("the id was taken over %d times", n)
	}
}

// In dry-run a tunnel that fails is recorded, and the connection goes on in clear.
func TestDryRunFallsBackLoudly(t *testing.T) {
	b := newHost(t, proxytest.NewCA(t, "lab.test"), hostConfig{mode: authz.DryRun})
	to := b.service(t, "b/sa/echo", echo)
	a := caller(t, authz.DryRun, proxytest.Policy{}, nil) // of another authority
	exchange(t, a.dial(t, to), "\x00in clear")
	if !a.dec.Logged("refuse: tunnel to") || !a.dec.Logged("mesh=false: permit") {
		t.Errorf("log = %q", a.dec.Log())
	}
	// The same peer, and enforce: nothing.
	a = caller(t, authz.Enforce, proxytest.Policy{}, nil)
	a.denied(t, to)
}
