package policy

import (
	"net/netip"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/policy/authz"
)

func newParty(uid cedar.EntityUID, attrs cedar.RecordMap, above ...cedar.EntityUID) *party {
	return &party{
		entity: cedar.Entity{
			UID:        uid,
			Parents:    types.NewEntityUIDSet(above...),
			Attributes: cedar.NewRecord(attrs),
		},
		above: above,
	}
}

// callerOf builds the principal. Only a verified SPIFFE ID makes a Workload;
// an address alone is Anonymous, whatever it is an address of.
func callerOf(id spiffeid.ID, addr netip.Addr) *party {
	if id.IsZero() {
		return newParty(
			cedar.NewEntityUID(typeAnonymous, cedar.String(plain(addr).String())),
			cedar.RecordMap{"addr": ipValue(addr)},
		)
	}
	attrs := cedar.RecordMap{}
	above := describe(id, attrs)
	attrs["path"] = cedar.String(id.Path())
	return newParty(cedar.NewEntityUID(typeWorkload, cedar.String(id.String())), attrs, above...)
}

// serviceOf builds the resource of a connection to a service.
func serviceOf(id spiffeid.ID, addr netip.AddrPort) *party {
	attrs, above := addressOf(addr)
	if id.IsZero() {
		return newParty(cedar.NewEntityUID(typeService, cedar.String(hostPort(addr))), attrs, above...)
	}
	above = append(above, describe(id, attrs)...)
	return newParty(cedar.NewEntityUID(typeService, cedar.String(id.String())), attrs, above...)
}

// externalOf builds the resource of a connection to an external host.
func externalOf(addr netip.AddrPort) *party {
	attrs, above := addressOf(addr)
	return newParty(cedar.NewEntityUID(typeExternalHost, cedar.String(hostPort(addr))), attrs, above...)
}

// endpointOf builds an endpoint of a service.
func endpointOf(e *endpoint, service *party) *party {
	attrs := service.entity.Attributes.Map()
	attrs["method"] = cedar.String(e.method)
	attrs["template"] = cedar.String(e.template)
	above := append([]cedar.EntityUID{service.entity.UID}, service.above...)
	return newParty(e.uid, attrs, above...)
}

func addressOf(addr netip.AddrPort) (cedar.RecordMap, []cedar.EntityUID) {
	attrs := cedar.RecordMap{
		"addr": ipValue(addr.Addr()),
		"port": cedar.Long(addr.Port()),
	}
	return attrs, []cedar.EntityUID{
		cedar.NewEntityUID(typeAddress, cedar.String(hostPort(addr))),
		cedar.NewEntityUID(typeAddress, cedar.String(plain(addr.Addr()).String())),
	}
}

// describe adds what a SPIFFE ID tells to attrs and returns the groups it lies in.
// Namespace and name exist only for ids of exactly the shape /ns/<namespace>/sa/<name>.
func describe(id spiffeid.ID, attrs cedar.RecordMap) []cedar.EntityUID {
	td := id.TrustDomain().Name()
	attrs["trust_domain"] = cedar.String(td)
	above := []cedar.EntityUID{cedar.NewEntityUID(typeTrustDomain, cedar.String(td))}
	parts := strings.Split(id.Path(), "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" {
		return above
	}
	attrs["namespace"] = cedar.String(parts[2])
	attrs["name"] = cedar.String(parts[4])
	group := "spiffe://" + td + "/ns/" + parts[2]
	return append(above, cedar.NewEntityUID(typeNamespace, cedar.String(group)))
}

// plain brings an address into the one form policies know: no zone, no IPv4 in IPv6.
func plain(ip netip.Addr) netip.Addr { return ip.WithZone("").Unmap() }

func hostPort(a netip.AddrPort) string {
	return netip.AddrPortFrom(plain(a.Addr()), a.Port()).String()
}

// ipValue is the address as Cedar's ipaddr. An invalid one, which no captured
// connection has, becomes the unspecified address, since the schema wants a value.
func ipValue(ip netip.Addr) cedar.Value {
	if ip = plain(ip); !ip.IsValid() {
		ip = netip.IPv6Unspecified()
	}
	return types.IPAddr(netip.PrefixFrom(ip, ip.BitLen()))
}

// pairKey is all of a connection that policy sees. Connections that agree in
// it get the same answers.
type pairKey struct {
	source      spiffeid.ID
	sourceIP    netip.Addr
	destination spiffeid.ID
	addr        netip.AddrPort
	mesh        bool
	external    bool
	// trusting marks where an HTTP policy may stand in for a connect permit; see pair.decideConnect.
	trusting bool
}

func keyFor(c *authz.Connection, external bool) pairKey {
	return pairKey{
		source:      c.Source.ID,
		sourceIP:    plain(c.Source.Addr.Addr()),
		destination: c.Destination.ID,
		addr:        netip.AddrPortFrom(plain(c.Destination.Addr.Addr()), c.Destination.Addr.Port()),
		mesh:        c.Mesh,
		external:    external,
		trusting:    c.Mesh || c.Side != authz.Egress,
	}
}
