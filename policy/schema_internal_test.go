package policy

import (
	"net/netip"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/policy/authz"
)

type authzRequest = authz.Request

func sampleRequest(m *mapped) cedar.Request {
	caller := callerOf(spiffeid.ID{}, netip.MustParseAddr("192.0.2.1"))
	service := serviceOf(spiffeid.ID{}, netip.MustParseAddrPort("192.0.2.2:80"))
	return cedar.Request{
		Principal: caller.entity.UID, Action: m.action, Resource: service.entity.UID,
		Context: m.context(ipValue(netip.MustParseAddr("192.0.2.1")), cedar.True, true),
	}
}

// Every entity the code builds must be what the schema promises, or policies
// that were validated could still fail.
func TestEntitiesFitTheSchema(t *testing.T) {
	addr4, addr6 := netip.MustParseAddrPort("[::ffff:192.0.2.2]:443"), netip.MustParseAddrPort("[fe80::1%eth0]:443")
	for _, id := range []string{"", "spiffe://lab.test", "spiffe://lab.test/x", "spiffe://lab.test/ns/a/sa/b", "spiffe://lab.test/ns/a/sa/b/c"} {
		var sid spiffeid.ID
		if id != "" {
			sid = spiffeid.RequireFromString(id)
		}
		for _, addr := range []netip.AddrPort{addr4, addr6} {
			service := serviceOf(sid, addr)
			for _, p := range []*party{callerOf(sid, addr.Addr()), service, externalOf(addr)} {
				if err := words.validator.Entity(p.entity); err != nil {
					t.Errorf("%v: %v", p.entity.UID, err)
				}
			}
			e, err := parseEndpoint(cedar.NewEntityUID(typeEndpoint, service.entity.UID.ID+" GET /a/{b}"))
			if err != nil {
				t.Fatal(err)
			}
			flat := endpointOf(e, service).entity
			// Ancestors are flattened, which the schema's direct parents do not show.
			flat.Parents = types.NewEntityUIDSet(service.entity.UID)
			if err := words.validator.Entity(flat); err != nil {
				t.Errorf("%v: %v", flat.UID, err)
			}
		}
	}
	if got := serviceOf(spiffeid.ID{}, addr4).entity.UID.ID; got != "192.0.2.2:443" {
		t.Errorf("mapped IPv4 became %q", got)
	}
	if got := serviceOf(spiffeid.ID{}, addr6).entity.UID.ID; got != "[fe80::1]:443" {
		t.Errorf("zone stayed in %q", got)
	}
}

func TestConnectContextFitsTheSchema(t *testing.T) {
	s := newSnapshot(nil)
	for _, external := range []bool{false, true} {
		p := s.newPair(pairKey{sourceIP: netip.MustParseAddr("192.0.2.1"), addr: netip.MustParseAddrPort("192.0.2.2:80"), external: external})
		err := words.validator.Request(cedar.Request{
			Principal: p.principal.entity.UID, Action: p.action, Resource: p.resource.entity.UID, Context: p.connectContext(),
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func TestMethodGroups(t *testing.T) {
	for method, groups := range map[string][]string{
		"GET": {"read", "http"}, "HEAD": {"read", "http"}, "OPTIONS": {"read", "http"},
		"POST": {"write", "http"}, "PUT": {"write", "http"}, "PATCH": {"write", "http"}, "DELETE": {"write", "http"},
		"TRACE": {"http"}, "CONNECT": {"http"}, "PROPFIND": {"http", "OTHER"}, "get": {"http", "OTHER"},
		"OTHER": {"http", "OTHER"}, "connect": {"http", "OTHER"}, "egress": {"http", "OTHER"}, "read": {"http", "OTHER"},
	} {
		for _, group := range []string{"read", "write", "http", "OTHER", "connect", "egress"} {
			want := false
			for _, g := range groups {
				want = want || g == group
			}
			if got := words.actionIn(words.method(method), cedar.NewEntityUID(typeAction, cedar.String(group))); got != want {
				t.Errorf("%s in %s: %v", method, group, got)
			}
		}
	}
}

// A condition that looks at segments in any way must be given them.
func TestLooksAtSegments(t *testing.T) {
	for condition, want := range map[string]bool{
		`context.request.segments.s0 == "a"`:                                              true,
		`context.mesh && context.request.segments.count == 1`:                             true,
		`context.request == context.request`:                                              true,
		`context == context`:                                                              true,
		`[context.request].contains(context.request)`:                                     true,
		`{a: context.request}.a.segments.count == 1`:                                      true,
		`(if context.mesh then context.request else context.request).segments.count == 1`: true,
		`context.request.path == "/a"`:                                                    false,
		`context.request has upgrade && context.request.upgrade == "websocket"`:           false,
		`context has request && context.request.host == "h"`:                              false,
		`context.src_ip.isLoopback() && context.mesh`:                                     false,
		`principal is Workload`:                                                           false,
	} {
		s := snapshotOf(t, `permit(principal, action == Action::"GET", resource is Service) when { `+condition+` };`)
		if got := s.rules[0].segments; got != want {
			t.Errorf("%s: %v", condition, got)
		}
	}
}
