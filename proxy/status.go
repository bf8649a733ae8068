package proxy

import (
	"cmp"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/tunnel"
)

type counters struct {
	live                                       atomic.Int64
	outbound, inbound, tunnels, streams        atomic.Uint64
	closed, resets, seconds                    atomic.Uint64
	bytesUp, bytesDown                         atomic.Uint64
	denied, undecided, unidentified            atomic.Uint64
	failed, noOrigin, loops, answers           atomic.Uint64
	badConnects, handshakeErrors, tunnelErrors atomic.Uint64
	probes, shed, acceptErrors, exhausted      atomic.Uint64
	requests, requestsDenied, malformed        atomic.Uint64
	responses                                  [6]atomic.Uint64
}

// Stats is what the relay has counted since it was made. All but Live and
// Tunnels only grow.
type Stats struct {
	Live    int64 `json:"live"`    // connections and inbound tunnels now
	Tunnels int   `json:"tunnels"` // outgoing tunnels now

	AcceptedOutbound uint64 `json:"accepted_outbound"`
	AcceptedInbound  uint64 `json:"accepted_inbound"`
	AcceptedTunnels  uint64 `json:"accepted_tunnels"`
	AcceptedStreams  uint64 `json:"accepted_streams"`
	DialledTunnels   uint64 `json:"dialled_tunnels"`
	Closed           uint64 `json:"closed"` // connections that were carried and have ended
	Resets           uint64 `json:"resets"` // of those, by RST on either side or by policy
	Milliseconds     uint64 `json:"connection_milliseconds"`
	BytesUp          uint64 `json:"bytes_up"` // from clients
	BytesDown        uint64 `json:"bytes_down"`

	Denied       uint64 `json:"denied"`       // connections refused by policy or for want of an identity
	Undecided    uint64 `json:"undecided"`    // decisions that failed
	Unidentified uint64 `json:"unidentified"` // ends that no identity was found for
	Failed       uint64 `json:"failed"`       // connections whose far end could not be reached
	NoOrigin     uint64 `json:"no_origin"`    // dialled straight to a listener, or unknown to capture
	Loops        uint64 `json:"loops"`        // to one of the agent's own ports
	Answers      uint64 `json:"far_refusals"` // CONNECTs that the far agent did not grant

	BadConnects     uint64 `json:"bad_connects"` // CONNECTs answered with 400
	HandshakeErrors uint64 `json:"handshake_errors"`
	TunnelErrors    uint64 `json:"tunnel_errors"`
	Probes          uint64 `json:"probes"`
	Shed            uint64 `json:"shed"` // reset at accept: relay full or stopping
	AcceptErrors    uint64 `json:"accept_errors"`
	Exhausted       uint64 `json:"exhausted"` // of those, for want of descriptors or memory

	Requests       uint64 `json:"requests"` // HTTP
	RequestsDenied uint64 `json:"requests_denied"`
	Malformed      uint64 `json:"malformed"` // refused by the HTTP filter itself
	// Responses counts by status class: index 1 is 1xx; index 0 is anything else.
	Responses [6]uint64 `json:"responses"`
}

// Stats returns the counters.
func (r *Relay) Stats() Stats {
	c := &r.count
	s := Stats{
		Live: c.live.Load(), Tunnels: len(r.pool.Tunnels()),
		AcceptedOutbound: c.outbound.Load(), AcceptedInbound: c.inbound.Load(),
		AcceptedTunnels: c.tunnels.Load(), AcceptedStreams: c.streams.Load(),
		DialledTunnels: r.pool.Dialled(), Closed: c.closed.Load(), Resets: c.resets.Load(),
		Milliseconds: c.seconds.Load(), BytesUp: c.bytesUp.Load(), BytesDown: c.bytesDown.Load(),
		Denied: c.denied.Load(), Undecided: c.undecided.Load(), Unidentified: c.unidentified.Load(),
		Failed: c.failed.Load(), NoOrigin: c.noOrigin.Load(), Loops: c.loops.Load(), Answers: c.answers.Load(),
		BadConnects: c.badConnects.Load(), HandshakeErrors: c.handshakeErrors.Load(),
		TunnelErrors: c.tunnelErrors.Load(), Probes: c.probes.Load(), Shed: c.shed.Load(),
		AcceptErrors: c.acceptErrors.Load(), Exhausted: c.exhausted.Load(),
		Requests: c.requests.Load(), RequestsDenied: c.requestsDenied.Load(), Malformed: c.malformed.Load(),
	}
	for i := range s.Responses {
		s.Responses[i] = c.responses[i].Load()
	}
	return s
}

// ConnectionInfo describes one live connection.
type ConnectionInfo struct {
	ID            authz.ID       `json:"id"`
	Scope         string         `json:"scope"`
	Mode          authz.Mode     `json:"mode"`
	Side          authz.Side     `json:"side"`
	Carrier       Carrier        `json:"carrier"`
	Protocol      string         `json:"protocol"` // "http" or "opaque"
	Source        netip.AddrPort `json:"source"`
	SourceID      string         `json:"source_id,omitempty"`
	Unit          string         `json:"unit,omitempty"`
	Destination   netip.AddrPort `json:"destination"`
	DestinationID string         `json:"destination_id,omitempty"`
	Since         time.Time      `json:"since"`
	Requests      uint64         `json:"requests"`
	BytesUp       uint64         `json:"bytes_up"`
	BytesDown     uint64         `json:"bytes_down"`
	HalfClosed    bool           `json:"half_closed,omitempty"`
}

// Connections describes the live connections of every scope, oldest first.
func (r *Relay) Connections() []ConnectionInfo {
	var infos []ConnectionInfo
	for _, s := range r.all() {
		for _, l := range s.live() {
			infos = append(infos, l.info())
		}
	}
	slices.SortFunc(infos, func(a, b ConnectionInfo) int { return a.Since.Compare(b.Since) })
	return infos
}

func (l *link) info() ConnectionInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	protocol := "opaque"
	if l.http.requests > 0 {
		protocol = "http"
	}
	c := &l.conn
	return ConnectionInfo{
		ID: c.ID, Scope: c.Scope, Mode: c.Mode, Side: c.Side, Carrier: l.carrier, Protocol: protocol,
		Source: c.Source.Addr, SourceID: idString(c.Source.ID), Unit: c.Source.Unit,
		Destination: c.Destination.Addr, DestinationID: idString(c.Destination.ID),
		Since: l.started, Requests: l.http.requests, BytesUp: l.down.bytes, BytesDown: l.up.bytes,
		HalfClosed: l.down.sent || l.up.sent,
	}
}

// PeerInfo describes what is known of the agent at an address.
type PeerInfo struct {
	Scope string     `json:"scope"`
	Addr  netip.Addr `json:"addr"`
	State string     `json:"state"` // "agent", "none", "silent" or "unknown"
	// Identity is the SPIFFE ID shown last, Group whose workloads the address may show.
	Identity string `json:"identity,omitempty"`
	Group    string `json:"group,omitempty"`
	Pin      string `json:"pin,omitempty"`
}

// Peers describes the peers that are remembered.
func (r *Relay) Peers() []PeerInfo {
	t := &r.peers
	t.mu.Lock()
	infos := make([]PeerInfo, 0, len(t.m))
	for k, p := range t.m {
		infos = append(infos, PeerInfo{
			Scope: k.scope, Addr: k.ip, State: p.state.String(),
			Identity: p.lastID, Group: p.group, Pin: t.pins[k.ip],
		})
	}
	t.mu.Unlock()
	slices.SortFunc(infos, func(a, b PeerInfo) int {
		return cmp.Or(cmp.Compare(a.Scope, b.Scope), a.Addr.Compare(b.Addr))
	})
	return infos
}

// Tunnels describes the outgoing tunnels.
func (r *Relay) Tunnels() []tunnel.Info { return r.pool.Tunnels() }
