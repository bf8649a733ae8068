package policy_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

func TestExplainSaysWhatPoliciesSay(t *testing.T) {
	log := memoryLog(t)
	e := engineOf(t, policy.Config{Log: log, Dir: write(t, "shop.cedar",
		"// first\npermit(principal, action, resource);\n  @id(\"no\") @reason(\"not on Sundays\") @severity(\"low\") @owner(\"ops\")\n  forbid(principal, action == Action::\"connect\", resource) when { context.mesh };\n")})
	c := meshed(curl, nginx)
	d := connect(t, open(t, e, c))
	x := e.Explain(log.Find(d.ID)[0])
	if !x.Exact || x.Considered != 2 || len(x.Policies) != 2 {
		t.Fatalf("%+v", x)
	}
	no := x.Policies[0]
	if no.ID != "no" || no.Place != "shop.cedar:3:3" || no.Effect != "forbid" || !no.Determining || !no.Matched ||
		no.Annotations["owner"] != "ops" || !strings.Contains(no.Text, "context.mesh") {
		t.Errorf("%+v", no)
	}
	// What is shown to an operator goes over a socket as JSON and back.
	text, err := json.Marshal(x)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), `"id":"`+d.ID.String()+`"`) || !strings.Contains(string(text), `"side":"ingress"`) {
		t.Errorf("%s", text)
	}
}

func TestExplainIsBounded(t *testing.T) {
	log := memoryLog(t)
	e := engineOf(t, policy.Config{Log: log, Dir: write(t, "p.cedar", manyPolicies(300))})
	s := open(t, e, meshed(curl, nginx))
	d := request(t, s, "GET", "/other/"+strings.Repeat("x", 900))
	x := e.Explain(log.Find(d.ID)[0])
	if len(x.Policies) != 20 || x.Considered != 303 {
		t.Fatalf("%d of %d", len(x.Policies), x.Considered)
	}
	if p := x.Policies[0]; p.Part != "when" || !strings.HasPrefix(p.Clause, "context.request") || len(p.Values) != 1 || len(p.Values[0]) > 400 {
		t.Errorf("%+v", p)
	}
}

// A record may come from a file that somebody wrote by hand.
func TestExplainHostileRecords(t *testing.T) {
	e := engine(t, permitAll)
	for _, r := range []decisionlog.Record{
		{},
		{Principal: "spiffe://", Resource: "spiffe://"},
		{Principal: "anonymous", Resource: "spiffe://x y/"},
		{Principal: "anonymous", Method: "\x00", Path: "\x00"},
		{Principal: "anonymous", Action: "refuse", Reason: "r"},
	} {
		if x := e.Explain(r); x.Exact {
			t.Errorf("%+v", x)
		}
	}
}

func TestInternalIsTheAgentsToSay(t *testing.T) {
	dir := write(t, "p.cedar", `permit(principal, action == Action::"egress", resource == ExternalHost::"10.0.0.9:80");`)
	var asked []string
	e := engineOf(t, policy.Config{Dir: dir, Internal: func(scope string, ip netip.Addr) bool {
		asked = append(asked, scope+" "+ip.String())
		return false
	}})
	c := meshed(curl, "")
	c.Side, c.Mesh, c.Destination.Addr = authz.Egress, false, netip.MustParseAddrPort("[::ffff:10.0.0.9]:80")
	want(t, connect(t, open(t, e, c)), authz.Permit)
	if len(asked) != 1 || asked[0] != "host 10.0.0.9" {
		t.Errorf("asked %v", asked)
	}
	// What has an identity, or is asked about beside the service, is a service.
	for _, change := range []func(*authz.Connection){
		func(c *authz.Connection) { c.Destination.ID = meshed("", nginx).Destination.ID },
		func(c *authz.Connection) { c.Side = authz.Ingress },
		func(c *authz.Connection) { c.Mesh = true },
	} {
		d := c
		change(&d)
		want(t, connect(t, open(t, e, d)), authz.Deny)
	}
	want(t, connect(t, open(t, engine(t, strings.ReplaceAll(`permit(principal, action == Action::"egress", resource == ExternalHost::"10.0.0.9:80");`, "\n", "")), c)), authz.Deny)
}
