package policy_test

import (
	"fmt"
	"testing"

	"ringfence.dev/policy/authz"
)

// conditions that look at parts which are not known when a service is examined,
// in every form that an evaluator might fold too eagerly. Each holds for the
// request of TestHTTPOnlyNeverFoldsAway.
var unknownConditions = []string{
	`principal is Workload`,
	`!(principal is Anonymous)`,
	`principal is Workload in TrustDomain::"lab.test"`,
	`principal in TrustDomain::"lab.test"`,
	`principal in [TrustDomain::"lab.test", TrustDomain::"other.test"]`,
	`principal == Workload::"spiffe://lab.test/ns/a/sa/curl"`,
	`principal != Workload::"spiffe://lab.test/ns/a/sa/wget"`,
	`[principal].contains(principal)`,
	`action == Action::"GET"`,
	`action in Action::"read"`,
	`action in [Action::"write", Action::"read"]`,
	`action != Action::"HEAD"`,
	`context.mesh`,
	`!context.mesh == false`,
	`context.mesh == true`,
	`context.src_ip == ip("192.0.2.1")`,
	`context.src_ip.isInRange(ip("192.0.2.0/24"))`,
	`context.request.path == "/a"`,
	`context.request.path like "/*"`,
	`!(context.request.path like "/b*")`,
	`context.request.segments.count < 2`,
	`context.request.segments.count + 1 == 2`,
	`context.request.segments.count >= resource.port - 79`,
	`["GET", "HEAD"].contains(context.request.method)`,
	`["GET", "HEAD"].containsAll([context.request.method])`,
	`["GET", "HEAD"].containsAny([context.request.method])`,
	`context has request && context.request has method`,
	`!(context.request has upgrade)`,
	`if context.mesh then context.request.path == "/a" else false`,
	`if resource.port == 80 then context.request.path == "/a" else false`,
	`if context.request.path == "/a" then resource.port == 80 else resource.port == 81`,
	`context.request.path == "/b" || context.request.path == "/a"`,
	`resource.port == 81 || context.request.path == "/a"`,
	`resource.port == 80 && context.request.path == "/a"`,
	`{path: context.request.path} == {path: "/a"}`,
	`{port: resource.port, path: context.request.path}.port == 80`,
	`context.request.host == "nginx.lab.test"`,
	`resource has name && resource.name == "nginx"`,
	`resource in Namespace::"spiffe://lab.test/ns/b" && resource is Service`,
	`resource.addr.isInRange(ip("192.0.2.0/24"))`,
}

// A condition on what is not known yet must count as one that may hold: were it
// folded away, the service would take bytes that nobody decides.
func TestHTTPOnlyNeverFoldsAway(t *testing.T) {
	for i, condition := range unknownConditions {
		for _, form := range []string{
			`%s(principal, action in Action::"read", resource is Service) when { %s };`,
			`%s(principal, action in Action::"read", resource is Service) unless { !(%s) };`,
		} {
			for _, effect := range []string{"permit", "forbid"} {
				text := fmt.Sprintf(form, effect, condition)
				s := open(t, engine(t, text), meshed(curl, nginx))
				if !s.HTTPOnly() {
					t.Errorf("%d: not HTTP-only under %s", i, text)
				}
				if effect == "permit" {
					want(t, connect(t, s), authz.Permit)
					want(t, request(t, s, "GET", "/a"), authz.Permit)
				}
			}
		}
	}
}

// What the service alone settles narrows the services that are HTTP-only.
func TestHTTPOnlyFoldsWhatTheServiceSettles(t *testing.T) {
	for _, text := range []string{
		`permit(principal, action in Action::"read", resource is Service) when { resource.port == 81 };`,
		`permit(principal, action in Action::"read", resource is Service) unless { resource.port == 80 };`,
		`permit(principal, action in Action::"read", resource is Service) when { resource.port == 81 && context.request.path == "/a" };`,
		`forbid(principal, action in Action::"read", resource is Service) when { !(resource has name) };`,
		`permit(principal, action in Action::"read", resource == Service::"` + redis + `");`,
		`permit(principal, action in Action::"read", resource == Endpoint::"` + redis + ` GET /");`,
		`permit(principal, action in Action::"read", resource is Endpoint in Service::"` + redis + `");`,
		`permit(principal, action == Action::"egress", resource);`,
		`@mode("dry-run") permit(principal, action in Action::"read", resource);`,
		permitAll,
	} {
		if s := open(t, engine(t, text), meshed(curl, nginx)); s.HTTPOnly() {
			t.Errorf("HTTP-only under %s", text)
		}
	}
}

// Each way to name HTTP makes a service HTTP-only.
func TestHTTPOnlyScopes(t *testing.T) {
	for _, text := range []string{
		`permit(principal, action == Action::"GET", resource);`,
		`permit(principal, action in Action::"http", resource);`,
		`permit(principal, action in [Action::"connect", Action::"POST"], resource);`,
		`forbid(principal, action == Action::"OTHER", resource in Namespace::"spiffe://lab.test/ns/b");`,
		`permit(principal, action == Action::"GET", resource in TrustDomain::"lab.test");`,
		`permit(principal, action == Action::"GET", resource in Address::"192.0.2.2");`,
		`permit(principal, action == Action::"GET", resource in Address::"192.0.2.2:80");`,
		`permit(principal, action == Action::"GET", resource is Service in Namespace::"spiffe://lab.test/ns/b");`,
		`permit(principal, action, resource == Endpoint::"` + nginx + ` GET /");`,
		`permit(principal, action, resource in Endpoint::"` + nginx + ` * /{x...}");`,
		`permit(principal, action, resource is Endpoint);`,
		`permit(principal, action, resource is Endpoint in Service::"` + nginx + `");`,
	} {
		if s := open(t, engine(t, permitAll+text), meshed(curl, nginx)); !s.HTTPOnly() {
			t.Errorf("not HTTP-only under %s", text)
		}
	}
}
