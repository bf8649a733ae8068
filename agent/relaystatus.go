package agent

import (
	"fmt"
	"net/netip"
	"strings"

	"ringfence.dev/agent/admin"
)

// relayStatus fills in connections, peers and the relay's counters.
func (a *Agent) relayStatus(s *admin.Status) {
	s.Connections = []admin.Connection{}
	for _, c := range a.relay.Connections() {
		s.Connections = append(s.Connections, admin.Connection{
			Decision: c.ID.String(), Scope: c.Scope, Side: c.Side.String(), Carrier: string(c.Carrier), Protocol: c.Protocol,
			Source: c.Source.String(), SourceID: c.SourceID, Destination: c.Destination.String(), DestID: c.DestinationID,
			Opened: c.Since, BytesIn: c.BytesUp, BytesOut: c.BytesDown, Requests: c.Requests,
		})
	}
	tunnels, streams := map[peerOf]int{}, map[peerOf]int{}
	for _, t := range a.relay.Tunnels() {
		k := peerOf{t.Scope, t.To.Addr()}
		tunnels[k]++
		streams[k] += t.Streams
	}
	s.Peers = []admin.Peer{}
	for _, p := range a.relay.Peers() {
		k := peerOf{p.Scope, p.Addr}
		s.Peers = append(s.Peers, admin.Peer{
			Scope: p.Scope, Addr: p.Addr.String(), Agent: agentAnswer(p.State), ID: p.Identity, Group: p.Group,
			Pin: p.Pin, Tunnels: tunnels[k], Streams: streams[k],
		})
	}
	for name, v := range a.counters() {
		s.Counters[name] = int64(v)
	}
	st := a.relay.Stats()
	if st.Exhausted > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf("%d times a connection could not be accepted for want of descriptors or memory: raise LimitNOFILE of the agent's unit", st.Exhausted))
	}
	if st.Shed > 0 {
		s.Problems = append(s.Problems, fmt.Sprintf("%d connections were shed because the relay was full", st.Shed))
	}
}

type peerOf struct {
	scope string
	addr  netip.Addr
}

// agentAnswer says whether a peer has an agent, as people ask it.
func agentAnswer(state string) string {
	switch state {
	case "agent":
		return "yes"
	case "none":
		return "no"
	default:
		return "unknown"
	}
}

// ClearPeer forgets what is known of the agent at an address.
func (a *Agent) ClearPeer(addr string) error {
	ip, err := netip.ParseAddr(strings.Trim(addr, "[]"))
	if err != nil {
		return admin.BadRequest{Err: err}
	}
	a.relay.ClearPeer(ip)
	return nil
}
