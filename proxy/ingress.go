package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"

	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/proxy/socket"
	"ringfence.dev/proxy/tunnel"
)

// serveInbound takes one plaintext connection to a workload of the scope: from
// a peer without an agent, and so without an identity.
func (s *Scope) serveInbound(ctx context.Context, a socket.Accepted) *link {
	client, f := s.captured(flow.Inbound, a)
	if client == nil {
		return nil
	}
	l := s.newLink(CarrierPlain)
	l.down.attach(client)
	setup, cancel := context.WithTimeout(ctx, s.relay.cfg.SetupTimeout)
	status := s.admitInbound(setup, l, f, authz.Peer{Addr: f.Source}, authz.NewID())
	cancel()
	if status != http.StatusOK {
		client.Reset()
		return nil
	}
	l.filterFor("", nil)
	l.own = client
	return l
}

// admitInbound decides an inbound connection and connects it to the workload.
// It returns the status that an HBONE peer is answered with.
func (s *Scope) admitInbound(ctx context.Context, l *link, f flow.Flow, from authz.Peer, id authz.ID) int {
	if s.own(f.Destination) {
		s.relay.count.loops.Add(1)
		return http.StatusServiceUnavailable
	}
	l.conn = authz.Connection{
		ID: id, Scope: s.name, Mode: s.Mode(), Side: authz.Ingress,
		Source: from, Destination: authz.Service{Addr: f.Destination}, Mesh: l.carrier == CarrierTunnel,
	}
	owner, err := s.relay.cfg.Identifier.Owner(ctx, s.name, f.Destination)
	if err != nil {
		s.relay.count.unidentified.Add(1)
		if !s.refused(l.conn, fmt.Sprintf("service has no identity: %v", err)) {
			return http.StatusServiceUnavailable
		}
	}
	if l.shown != (spiffeid.ID{}) && err == nil && owner.ID != l.shown {
		// The client decided on the identity that the tunnel showed for the port
		// it named; another owner's port must not be reached under it.
		if !s.refused(l.conn, fmt.Sprintf("port belongs to %s, tunnel was made to %s", owner.ID, l.shown)) {
			return http.StatusServiceUnavailable
		}
	}
	l.conn.Destination.ID = owner.ID
	session, allowed := s.connect(l.conn)
	if !allowed {
		return http.StatusUnauthorized
	}
	l.session = session
	server, err := s.dial(ctx, Dial{To: f.Destination, Client: f.Source, Flow: f})
	if err != nil {
		s.relay.count.failed.Add(1)
		return http.StatusServiceUnavailable
	}
	l.mu.Lock()
	l.up.attach(server)
	l.mu.Unlock()
	l.server = server
	return http.StatusOK
}

// serveTunnel takes one tunnel from a peer's agent and runs it to its end.
func (s *Scope) serveTunnel(ctx context.Context, a socket.Accepted) *link {
	sock, err := socket.New(a.FD)
	if err != nil {
		s.relay.count.failed.Add(1)
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = sock.SetDeadline(past) })
	var conn *tunnel.Conn
	conn, err = tunnel.Server(ctx, sock, tunnel.ServerConfig{
		Certificate: s.certificate,
		Verify:      s.relay.cfg.Credentials.Verify,
		Deadline:    s.relay.cfg.SetupTimeout,
		Handler: func(st *tunnel.Stream, r *tunnel.Request) tunnel.Sink {
			return s.accepted(ctx, conn, st, r)
		},
	})
	if err != nil {
		stop()
		s.relay.count.handshakeErrors.Add(1)
		return nil
	}
	if stop() && s.enterTunnel(conn) {
		if conn.Run() != nil {
			s.relay.count.tunnelErrors.Add(1)
		}
		s.leaveTunnel(conn)
		return nil
	}
	conn.Close()
	_ = conn.Run()
	return nil
}

func (s *Scope) enterTunnel(t *tunnel.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return false
	}
	s.tunnels[t] = struct{}{}
	return true
}

func (s *Scope) leaveTunnel(t *tunnel.Conn) {
	s.mu.Lock()
	delete(s.tunnels, t)
	s.mu.Unlock()
}

// certificate chooses whose SVID a tunnel's server shows: the owner's of the
// port that the client named, else the scope's sole workload's or the node's.
func (s *Scope) certificate(ctx context.Context, local netip.AddrPort, port uint16, named bool) (*tls.Certificate, spiffeid.ID, error) {
	ctx, cancel := context.WithTimeout(ctx, s.relay.cfg.SetupTimeout)
	defer cancel()
	var who workload.Identity
	var err error
	if named {
		who, err = s.relay.cfg.Identifier.Owner(ctx, s.name, netip.AddrPortFrom(local.Addr(), port))
	}
	if !named || (err != nil && s.Mode() != authz.Enforce) {
		who, err = s.relay.cfg.Identifier.Sole(ctx, s.name)
	}
	if err != nil {
		return nil, spiffeid.ID{}, fmt.Errorf("whose certificate to show: %w", err)
	}
	cert, err := s.relay.cfg.Credentials.Certificate(ctx, who.ID)
	return cert, who.ID, err
}

// accepted is called by a tunnel's reader for each stream. What takes time
// happens in the link's own goroutine.
func (s *Scope) accepted(ctx context.Context, conn *tunnel.Conn, stream *tunnel.Stream, r *tunnel.Request) tunnel.Sink {
	s.relay.count.streams.Add(1)
	l := s.newLink(CarrierTunnel)
	l.down.attachStream(stream)
	if shown, port := conn.Shown(); port != 0 {
		l.shown = shown
	}
	live := s.relay.count.live.Add(1)
	s.mu.Lock()
	cut := s.cut || live > int64(s.relay.cfg.MaxConnections)
	if !cut {
		// conn's own goroutine is among the work, so it cannot have dropped to zero.
		s.work.Add(1)
	}
	s.mu.Unlock()
	if cut {
		s.relay.count.live.Add(-1)
		s.relay.count.shed.Add(1)
		stream.Close()
		return (*downSink)(l)
	}
	go func() {
		defer s.work.Done()
		defer s.relay.count.live.Add(-1)
		if s.serveStream(ctx, l, conn, stream, r) {
			l.run()
		}
	}()
	return (*downSink)(l)
}

// serveStream sets a stream's link up, or answers why not and reports false.
func (s *Scope) serveStream(ctx context.Context, l *link, conn *tunnel.Conn, stream *tunnel.Stream, r *tunnel.Request) bool {
	f, id, err := inboundFlow(conn, r)
	if err != nil {
		s.relay.count.badConnects.Add(1)
		stream.Respond(http.StatusBadRequest)
		stream.Close()
		return false
	}
	f.Scope = s.name
	setup, cancel := context.WithTimeout(ctx, s.relay.cfg.SetupTimeout)
	status := s.admitInbound(setup, l, f, authz.Peer{ID: conn.Peer(), Addr: f.Source}, id)
	cancel()
	if status != http.StatusOK {
		stream.Respond(status)
		stream.Close()
		return false
	}
	l.filterFor(conn.Peer().String(), conn.PeerHash())
	stream.Respond(http.StatusOK)
	l.own = l.server
	return true
}

// inboundFlow reads what a CONNECT asks for. Its address must be the one that
// the tunnel itself was made to: an agent is no proxy to elsewhere.
func inboundFlow(conn *tunnel.Conn, r *tunnel.Request) (flow.Flow, authz.ID, error) {
	if !r.Connect() {
		return flow.Flow{}, authz.ID{}, errors.New("not a CONNECT")
	}
	to, err := netip.ParseAddrPort(r.Authority)
	if err != nil {
		return flow.Flow{}, authz.ID{}, fmt.Errorf("authority: %w", err)
	}
	to = unmap(to)
	if to.Port() == 0 || to.Addr() != conn.Local.Addr() {
		return flow.Flow{}, authz.ID{}, fmt.Errorf("authority %s is not at %s", to, conn.Local.Addr())
	}
	if _, port := conn.Shown(); port != 0 && port != to.Port() {
		return flow.Flow{}, authz.ID{}, fmt.Errorf("authority names port %d, tunnel is for %d", to.Port(), port)
	}
	id, err := authz.ParseID(r.Decision)
	if err != nil || id.Seq != 0 || id.IsZero() {
		id = authz.NewID()
	}
	return flow.Flow{Direction: flow.Inbound, Source: clientOf(conn, r.Forwarded), Destination: to}, id, nil
}

// clientOf is the address of the workload behind a tunnel: the one its agent
// tells if it is at the tunnel's own address, else the tunnel's. So an agent
// cannot make its workload look like somebody else's.
func clientOf(conn *tunnel.Conn, forwarded string) netip.AddrPort {
	text, ok := strings.CutPrefix(forwarded, `for="`)
	if text, _, ok2 := strings.Cut(text, `"`); ok && ok2 {
		if from, err := netip.ParseAddrPort(text); err == nil && unmap(from).Addr() == conn.Remote.Addr() {
			return unmap(from)
		}
	}
	return conn.Remote
}

// attachStream makes a tunnel stream one of the link's ends.
func (p *port) attachStream(s *tunnel.Stream) {
	p.to = s
	p.give = s.Release
	p.wake = func() { s.Reset(http2.ErrCodeCancel) }
	p.drop = func(bool) { s.Close() }
}

// upSink receives what the server behind a tunnel sends.
type upSink link

// downSink receives what a client behind a tunnel sends.
type downSink link

func (k *upSink) OnResponse(status int) { (*link)(k).answered(status) }
func (k *upSink) OnData(b []byte)       { (*link)(k).pushed(&k.up, b) }
func (k *upSink) OnEnd()                { (*link)(k).pushedEnd(&k.up) }

func (k *upSink) OnReset(err error) {
	(*link)(k).reset(err)
	(*link)(k).answered(0)
}

func (k *downSink) OnResponse(int)    {}
func (k *downSink) OnData(b []byte)   { (*link)(k).pushed(&k.down, b) }
func (k *downSink) OnEnd()            { (*link)(k).pushedEnd(&k.down) }
func (k *downSink) OnReset(err error) { (*link)(k).reset(err) }

// answered passes the CONNECT's status, or its lack, to whoever waits for it.
func (l *link) answered(status int) {
	select {
	case l.answer <- status:
	default: // nobody does any more
	}
}

// reset takes a stream's reset. Before the link is live it is only noted: the
// CONNECT may yet succeed in another tunnel.
func (l *link) reset(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.live {
		l.cutLocked(err)
	} else {
		l.err = err
	}
}

func (l *link) pushed(p *port, b []byte) {
	l.mu.Lock()
	l.takeLocked(p, b, false)
	l.mu.Unlock()
}

func (l *link) pushedEnd(p *port) {
	l.mu.Lock()
	p.eof = true
	l.takeLocked(p, nil, false)
	l.mu.Unlock()
}

// run carries the link to its end. It is called from the goroutine's outermost
// frame: what setting up has put on the stack is gone by then, so that the
// stack of an idle connection can shrink.
func (l *link) run() {
	if !l.scope.enter(l) {
		l.abort(errStopped)
	}
	// Mode and policies may have changed before the link was in the table.
	l.setMode(l.scope.Mode())
	if l.scope.relay.decidedLately() {
		l.reevaluate()
	}
	l.begin()
	p := &l.down
	if l.own == l.server {
		p = &l.up
	} else if l.server != nil { // two sockets: the second one's reader
		l.mu.Lock()
		l.running++
		l.mu.Unlock()
		go l.pumpServer()
	}
	l.pump(p, l.own)
	l.wait()
	l.scope.leave(l)
	l.account()
}

func (l *link) pumpServer() {
	l.pump(&l.up, l.server)
	l.mu.Lock()
	l.running--
	l.cond.Broadcast()
	l.mu.Unlock()
}

// account adds a finished link to the counters.
func (l *link) account() {
	l.mu.Lock() // a stream's last events may still be on their way
	defer l.mu.Unlock()
	c := &l.scope.relay.count
	c.closed.Add(1)
	if l.cut {
		c.resets.Add(1)
	}
	c.bytesUp.Add(l.down.bytes)
	c.bytesDown.Add(l.up.bytes)
	c.seconds.Add(uint64(time.Since(l.started) / time.Millisecond))
}
