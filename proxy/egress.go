package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/proxy/socket"
	"ringfence.dev/proxy/tunnel"
)

// egress is one captured outbound connection while it is being set up.
type egress struct {
	*Scope
	client *socket.Conn
	flow   flow.Flow
	who    workload.Identity
	conn   authz.Connection
}

// serveOutbound takes one connection that a workload opened. On every way out
// before the link lives, the client is reset: it has seen a handshake, not a byte.
func (s *Scope) serveOutbound(ctx context.Context, a socket.Accepted) *link {
	client, f := s.captured(flow.Outbound, a)
	if client == nil {
		return nil
	}
	e := &egress{Scope: s, client: client, flow: f}
	setup, cancel := context.WithTimeout(ctx, s.relay.cfg.SetupTimeout)
	l := e.establish(setup)
	cancel()
	if l == nil {
		client.Reset()
		return nil
	}
	l.own = client
	return l
}

// establish finds out who calls whom, decides, and connects. It returns nil
// after a refusal or failure, which it has counted.
func (e *egress) establish(ctx context.Context) *link {
	if e.own(e.flow.Destination) {
		e.relay.count.loops.Add(1)
		return nil
	}
	who, err := e.relay.cfg.Identifier.Caller(ctx, e.flow)
	e.who = who
	e.conn = authz.Connection{
		ID: authz.NewID(), Scope: e.name, Mode: e.Mode(), Side: authz.Egress,
		Source: authz.Peer{
			ID: who.ID, Addr: e.flow.Source, Unit: who.Unit, Exe: who.Exe,
			PID: e.flow.Caller.PID, UID: e.flow.Caller.UID,
		},
		Destination: authz.Service{Addr: e.flow.Destination},
	}
	if err != nil || who.ID.IsZero() {
		e.relay.count.unidentified.Add(1)
		if !e.tolerate(fmt.Sprintf("caller has no identity: %v", err)) {
			return nil
		}
	}
	dst := e.flow.Destination.Addr()
	if e.network.Local(dst) {
		return e.local(ctx)
	}
	if who.ID.IsZero() {
		return e.plain(ctx) // dry-run only: there is no SVID to show in a tunnel
	}
	return e.remote(ctx)
}

// tolerate records a refusal that is not a policy's and reports whether the
// connection goes on all the same, as in dry-run.
func (e *egress) tolerate(reason string) bool { return e.refused(e.conn, reason) }

func (s *Scope) refused(c authz.Connection, reason string) (goOn bool) {
	session, err := s.relay.open(c)
	if err != nil {
		return c.Mode != authz.Enforce
	}
	if session.Refuse(reason).Allowed() {
		return true
	}
	s.relay.count.denied.Add(1)
	return false
}

// decide asks policy about the connection. A nil session means refused.
func (e *egress) decide() authz.Session {
	session, allowed := e.connect(e.conn)
	if !allowed {
		if session != nil {
			e.network.Refused(e.flow, e.who)
		}
		return nil
	}
	return session
}

// connect opens a session and decides the connection. A session comes with
// every decision, and with a failed one that dry-run lets pass.
func (s *Scope) connect(c authz.Connection) (_ authz.Session, allowed bool) {
	session, err := s.relay.open(c)
	if err != nil {
		if c.Mode == authz.Enforce {
			return nil, false
		}
		return unrecorded{c.ID}, true
	}
	d, err := session.Connect()
	if err != nil {
		s.relay.count.undecided.Add(1)
		d = session.Refuse("connection could not be decided: " + err.Error())
		if !d.Allowed() {
			return nil, false // not Refused: that is for what policy has said
		}
	}
	if !d.Allowed() {
		s.relay.count.denied.Add(1)
	}
	return session, d.Allowed()
}

// local connects two workloads of this agent: one decision, no tunnel, one hop.
func (e *egress) local(ctx context.Context) *link {
	owner, err := e.relay.cfg.Identifier.Owner(ctx, e.name, e.flow.Destination)
	e.conn.Side, e.conn.Mesh = authz.Local, true
	e.conn.Destination.ID = owner.ID
	if err != nil && !e.tolerate(fmt.Sprintf("service has no identity: %v", err)) {
		return nil
	}
	session := e.decide()
	if session == nil {
		return nil
	}
	server, err := e.dial(ctx, Dial{To: e.flow.Destination, Client: e.flow.Source, Flow: e.flow})
	if err != nil {
		e.relay.count.failed.Add(1)
		return nil
	}
	l := e.newLink(CarrierLocal)
	l.conn, l.session = e.conn, session
	l.down.attach(e.client)
	l.up.attach(server)
	l.server = server
	l.filterFor(idString(e.conn.Source.ID), nil)
	return l
}

func idString(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

// remote connects to another host: through its agent if it has one.
func (e *egress) remote(ctx context.Context) *link {
	ip := e.flow.Destination.Addr()
	if !e.network.Mesh(ip) {
		if _, pinned := e.relay.cfg.Pins[ip]; !pinned {
			return e.plain(ctx)
		}
	}
	carrier, err := e.relay.peers.carrier(ctx, peerKey{e.name, ip}, e.relay.cfg.NoAgentFor,
		func(ctx context.Context) error { return e.probe(ctx, ip) })
	if err != nil {
		e.relay.count.failed.Add(1)
		if !e.tolerate(fmt.Sprintf("no carrier to %s: %v", ip, err)) {
			return nil
		}
		return e.plain(ctx)
	}
	if carrier == CarrierPlain {
		return e.plain(ctx)
	}
	l, err := e.tunnelled(ctx)
	if err != nil {
		e.relay.count.failed.Add(1)
		if e.tolerate(fmt.Sprintf("tunnel to %s: %v", ip, err)) {
			return e.plain(ctx)
		}
	}
	return l
}

// probe looks whether somebody accepts on the tunnel's port.
func (e *egress) probe(ctx context.Context, ip netip.Addr) error {
	e.relay.count.probes.Add(1)
	ctx, cancel := context.WithTimeout(ctx, e.relay.cfg.ProbeTimeout)
	defer cancel()
	f := flow.Flow{Scope: e.name, Device: e.flow.Device, BoundSource: e.flow.BoundSource}
	sock, err := e.dial(ctx, Dial{To: netip.AddrPortFrom(ip, tunnel.Port), Flow: f})
	if err != nil {
		return err
	}
	return sock.Close()
}

// plain connects to a peer without an agent, if policy lets it.
func (e *egress) plain(ctx context.Context) *link {
	// In dry-run a tunnel may have been tried before.
	e.conn.Mesh, e.conn.Destination.ID = false, spiffeid.ID{}
	session := e.decide()
	if session == nil {
		return nil
	}
	server, err := e.dial(ctx, Dial{To: e.flow.Destination, Flow: e.flow})
	if err != nil {
		e.relay.count.failed.Add(1)
		return nil
	}
	l := e.newLink(CarrierPlain)
	l.conn, l.session = e.conn, session
	l.down.attach(e.client)
	l.up.attach(server)
	l.server = server
	return l
}

// errAnswer reports a CONNECT that the far agent did not grant.
type errAnswer int

func (e errAnswer) Error() string { return fmt.Sprintf("far agent answered %d", int(e)) }

// tunnelled connects through the peer's agent. The tunnel comes first, because
// its certificate tells the service's identity, which policy may name; the
// workload's own octets leave only after the permit. A nil link without an
// error is a refusal; an error is a failure to reach the service.
func (e *egress) tunnelled(ctx context.Context) (*link, error) {
	cert, err := e.relay.cfg.Credentials.Certificate(ctx, e.who.ID)
	if err != nil {
		return nil, fmt.Errorf("own certificate: %w", err)
	}
	key := tunnel.Key{
		Scope: e.name, Source: e.who.ID, To: e.flow.Destination,
		Device: e.flow.Device, Bound: e.flow.BoundSource,
	}
	// A stream that the peer certainly did nothing with, because its agent was
	// just going away, is tried once more in a new tunnel (RFC 9113 section 8.7).
	var l *link
	for range 2 {
		var conn *tunnel.Conn
		if conn, err = e.relay.pool.Get(ctx, key, cert); err != nil {
			return nil, err
		}
		if l == nil {
			if l, err = e.permit(conn); l == nil || err != nil {
				conn.Unreserve()
				return nil, err
			}
		} else if conn.Peer() != e.conn.Destination.ID {
			conn.Unreserve()
			return nil, fmt.Errorf("%w: %s became %s", errChanged, e.conn.Destination.ID, conn.Peer())
		}
		if err = l.connectThrough(ctx, conn); err == nil {
			return l, nil
		}
		if !errors.Is(err, tunnel.ErrUnprocessed) && !errors.Is(err, tunnel.ErrDraining) {
			break
		}
	}
	var status errAnswer
	if errors.As(err, &status) {
		// The far side has decided and recorded under the same id; nothing is
		// to be tried another way, in dry-run neither.
		e.relay.count.answers.Add(1)
		return nil, nil
	}
	return nil, err
}

// permit decides a connection whose tunnel stands.
func (e *egress) permit(conn *tunnel.Conn) (*link, error) {
	ip := e.flow.Destination.Addr()
	if err := e.relay.peers.spoke(peerKey{e.name, ip}, conn.Peer()); err != nil {
		if !e.tolerate(err.Error()) {
			return nil, nil
		}
	}
	e.conn.Mesh = true
	e.conn.Destination.ID = conn.Peer()
	session := e.decide()
	if session == nil {
		return nil, nil
	}
	l := e.newLink(CarrierTunnel)
	l.conn, l.session = e.conn, session
	l.down.attach(e.client)
	l.answer = make(chan int, 1)
	return l, nil
}

// connectThrough sends the CONNECT and waits for its answer.
func (l *link) connectThrough(ctx context.Context, conn *tunnel.Conn) error {
	stream, err := conn.Open(&tunnel.Request{
		Authority: l.conn.Destination.Addr.String(),
		Decision:  l.conn.ID.String(),
		Forwarded: `for="` + l.conn.Source.Addr.String() + `"`,
		Baggage:   l.scope.relay.cfg.Baggage,
	}, (*upSink)(l))
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.up.attachStream(stream)
	l.mu.Unlock()
	var status int
	select {
	case status = <-l.answer:
	case <-ctx.Done():
		stream.Close()
		return ctx.Err()
	}
	if status == http.StatusOK {
		return nil
	}
	stream.Close()
	if status == 0 {
		l.mu.Lock()
		defer l.mu.Unlock()
		err, l.err = l.err, nil
		return err
	}
	return errAnswer(status)
}

// unrecorded stands in for the session of a connection that could not even be
// put to policy, in a scope that refuses nothing.
type unrecorded struct{ id authz.ID }

func (u unrecorded) wouldDeny() authz.Decision {
	return authz.Decision{ID: u.id, Effect: authz.WouldDeny, Reason: "no decision could be made"}
}

func (u unrecorded) Connect() (authz.Decision, error)               { return u.wouldDeny(), nil }
func (u unrecorded) Request(*authz.Request) (authz.Decision, error) { return u.wouldDeny(), nil }
func (u unrecorded) HTTPOnly() bool                                 { return false }
func (u unrecorded) Refuse(string) authz.Decision                   { return u.wouldDeny() }
