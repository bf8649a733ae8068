// Package flow describes one captured connection: which scope, which direction,
// from where to where. Values only. Inbound and outbound are always seen from
// the protected workload.
package flow

import (
	"net/netip"

	"ringfence.dev/attest/workload"
)

// Direction is which way a connection crosses the perimeter.
type Direction uint8

const (
	Outbound Direction = iota // the workload dialled
	Inbound                   // somebody dialled the workload
)

func (d Direction) String() string {
	if d == Inbound {
		return "inbound"
	}
	return "outbound"
}

// MarshalText writes the direction's name.
func (d Direction) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Flow is one connection as the agent's listener received it.
type Flow struct {
	Scope     string    // name of the scope it was captured in
	Direction Direction // seen from the workload
	// Source is the dialling side's address. IPv4 is never in its v4-mapped form.
	Source netip.AddrPort
	// Destination is what the dialling side asked for, before any redirect.
	Destination netip.AddrPort
	// Caller is the evidence about an outbound connection's opener; zero for inbound ones.
	Caller workload.Evidence
	// Device is the interface the caller had bound its socket to, zero for none.
	// The agent's own dial must be bound to it in turn.
	Device uint32
	// BoundSource is the address the caller had bound its socket to; invalid for none.
	BoundSource netip.Addr
}
