package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"ringfence.dev/policy/authz"
)

func snapshotOf(tb testing.TB, text string) *snapshot {
	tb.Helper()
	list, err := cedar.NewPolicyListFromBytes("p.cedar", []byte(text))
	if err != nil {
		tb.Fatal(err)
	}
	var rules []*rule
	for i, p := range list {
		r, err := newRule(fmt.Sprintf("p%04d", i), p)
		if err != nil {
			tb.Fatal(err)
		}
		rules = append(rules, r)
	}
	return newSnapshot(rules)
}

// A peer that dials every port must not fill the memory.
func TestPairsAreBounded(t *testing.T) {
	s := snapshotOf(t, `permit(principal, action, resource);`)
	for port := range 3 * maxPairs {
		key := pairKey{sourceIP: netip.IPv6Loopback(), addr: netip.AddrPortFrom(netip.IPv6Loopback(), uint16(port+1))}
		if p := s.pair(key); !p.connect.allowed || p.key != key {
			t.Fatal("wrong pair")
		}
	}
	if len(s.pairs) > maxPairs {
		t.Errorf("%d pairs", len(s.pairs))
	}
}

var (
	drawnCallers = []string{"", "spiffe://x.test/ns/a/sa/p", "spiffe://x.test/ns/b/sa/p", "spiffe://y.test/z"}
	drawnTargets = []string{"", "spiffe://x.test/ns/b/sa/s", "spiffe://x.test/ns/b/sa/t", "spiffe://y.test/s"}
	drawnSources = []string{
		`principal`, `principal is Anonymous`, `principal is Workload in TrustDomain::"x.test"`,
		`principal in TrustDomain::"y.test"`, `principal in Namespace::"spiffe://x.test/ns/a"`,
		`principal == Workload::"spiffe://x.test/ns/a/sa/p"`, `principal == Anonymous::"192.0.2.1"`,
	}
	drawnActions   = []string{`action`, `action == Action::"connect"`, `action in [Action::"read", Action::"connect"]`, `action == Action::"GET"`, `action in Action::"http"`}
	drawnResources = []string{
		`resource`, `resource is Service`, `resource in TrustDomain::"x.test"`, `resource in Namespace::"spiffe://x.test/ns/b"`,
		`resource == Service::"spiffe://x.test/ns/b/sa/s"`, `resource in Service::"spiffe://x.test/ns/b/sa/t"`,
		`resource == Service::"192.0.2.2:80"`, `resource in Address::"192.0.2.2"`, `resource in Address::"192.0.2.2:80"`,
		`resource is Service in TrustDomain::"y.test"`,
	}
	drawnConditions = []string{``, `when { context.mesh }`, `unless { context.mesh }`, `when { resource.port * 9223372036854775807 > 0 }`}
)

// The index must give what asking every policy gives: same outcome, same
// determining policies.
func TestIndexIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := ""
		for range rapid.IntRange(0, 12).Draw(t, "policies") {
			text += fmt.Sprintf("%s(%s, %s, %s) %s;\n",
				rapid.SampledFrom([]string{"permit", "permit", "forbid"}).Draw(t, "effect"),
				rapid.SampledFrom(drawnSources).Draw(t, "principal"), rapid.SampledFrom(drawnActions).Draw(t, "action"),
				rapid.SampledFrom(drawnResources).Draw(t, "resource"), rapid.SampledFrom(drawnConditions).Draw(t, "condition"))
		}
		key := pairKey{
			sourceIP: netip.MustParseAddr("192.0.2.1"), addr: netip.MustParseAddrPort("192.0.2.2:80"),
			mesh: rapid.Bool().Draw(t, "mesh"),
		}
		if id := rapid.SampledFrom(drawnCallers).Draw(t, "caller"); id != "" {
			key.source = spiffeid.RequireFromString(id)
		}
		if id := rapid.SampledFrom(drawnTargets).Draw(t, "target"); id != "" {
			key.destination = spiffeid.RequireFromString(id)
		}
		list, err := cedar.NewPolicyListFromBytes("p.cedar", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		var rules []*rule
		all := cedar.NewPolicySet()
		for i, p := range list {
			r, err := newRule(fmt.Sprintf("p%02d", i), p)
			if err != nil {
				return // a combination that the schema refuses
			}
			rules = append(rules, r)
			all.Add(cedar.PolicyID(r.id), p)
		}
		p := newSnapshot(rules).newPair(key)
		compare(t, p, all, p.action, p.connectContext(), func() verdict { v := p.connect; return v })
		if p.httpOnly && p.connect.allowed {
			m, err := mapRequest(&authz.Request{Method: "GET", Target: "/"}, false)
			if err != nil {
				t.Fatal(err)
			}
			compare(t, p, all, m.action, m.context(p.src, p.mesh, true), func() verdict { return p.decideRequest(&m) })
		}
	})
}

func compare(t *rapid.T, p *pair, all *cedar.PolicySet, action cedar.EntityUID, context cedar.Record, ask func() verdict) {
	decision, diag := cedar.Authorize(all, parties{p.principal, p.resource}, cedar.Request{
		Principal: p.principal.entity.UID, Action: action, Resource: p.resource.entity.UID, Context: context,
	})
	var ids []string
	for _, r := range diag.Reasons {
		ids = append(ids, string(r.PolicyID))
	}
	failed := false
	for _, e := range diag.Errors {
		if !p.snap.byID[string(e.PolicyID)].permit {
			if decision == cedar.Allow {
				ids, decision = nil, cedar.Deny
			}
			ids, failed = append(ids, string(e.PolicyID)), true
		}
	}
	v := ask()
	opened := v.allowed && action == actionConnect && decision == cedar.Deny && p.httpOnly
	if opened && len(ids) == 0 {
		return // opened for its requests
	}
	if v.allowed != (decision == cedar.Allow) || v.failed != failed || !slices.Equal(v.policies, named(ids)) && len(v.policies)+len(ids) > 0 {
		t.Fatalf("index says %+v, all policies say %v %v (failed %v)", v, decision, ids, failed)
	}
}
