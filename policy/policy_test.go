package policy_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	curl  = "spiffe://lab.test/ns/a/sa/curl"
	nginx = "spiffe://lab.test/ns/b/sa/nginx"
	redis = "spiffe://lab.test/ns/b/sa/redis"
)

// write makes a policy directory of name and text pairs.
func write(tb testing.TB, files ...string) string {
	tb.Helper()
	dir := tb.TempDir()
	for i := 0; i < len(files); i += 2 {
		put(tb, filepath.Join(dir, files[i]), files[i+1])
	}
	return dir
}

func put(tb testing.TB, path, text string) {
	tb.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
}

func engine(tb testing.TB, cedar string) *policy.Engine {
	tb.Helper()
	return engineOf(tb, policy.Config{Dir: write(tb, "p.cedar", cedar)})
}

func engineOf(tb testing.TB, cfg policy.Config) *policy.Engine {
	tb.Helper()
	e, err := policy.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

// meshed is an authenticated connection in an enforcing scope, as the ingress sees it.
func meshed(from, to string) authz.Connection {
	c := authz.Connection{
		ID: authz.NewID(), Scope: "host", Mode: authz.Enforce, Side: authz.Ingress, Mesh: true,
		Source:      authz.Peer{Addr: netip.MustParseAddrPort("192.0.2.1:40000")},
		Destination: authz.Service{Addr: netip.MustParseAddrPort("192.0.2.2:80")},
	}
	if from != "" {
		c.Source.ID = spiffeid.RequireFromString(from)
	}
	if to != "" {
		c.Destination.ID = spiffeid.RequireFromString(to)
	}
	return c
}

func open(tb testing.TB, e *policy.Engine, c authz.Connection) authz.Session {
	tb.Helper()
	s, err := e.Open(c)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func connect(tb testing.TB, s authz.Session) authz.Decision {
	tb.Helper()
	d, err := s.Connect()
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func request(tb testing.TB, s authz.Session, method, target string) authz.Decision {
	tb.Helper()
	d, err := s.Request(&authz.Request{Method: method, Target: target, Host: "nginx.lab.test"})
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

func want(tb testing.TB, d authz.Decision, effect authz.Effect) {
	tb.Helper()
	if d.Effect != effect {
		tb.Errorf("got %v (%s, %v), want %v", d.Effect, d.Reason, d.Policies, effect)
	}
}

const permitAll = `permit(principal, action, resource);`

// The lab's policy that permits everything must leave Redis and PostgreSQL alone.
func TestPermitEverythingIsNotHTTPOnly(t *testing.T) {
	s := open(t, engine(t, permitAll), meshed(curl, redis))
	if s.HTTPOnly() {
		t.Error("an unconstrained permit made a service HTTP-only")
	}
	want(t, connect(t, s), authz.Permit)
	want(t, request(t, s, "GET", "/../.."), authz.Permit)
}

func TestNoPolicy(t *testing.T) {
	for _, dir := range []string{"", filepath.Join(t.TempDir(), "absent"), t.TempDir()} {
		e := engineOf(t, policy.Config{Dir: dir})
		c := meshed(curl, nginx)
		want(t, connect(t, open(t, e, c)), authz.Deny)
		c.Mode = authz.DryRun
		d := connect(t, open(t, e, c))
		want(t, d, authz.WouldDeny)
		if !d.Allowed() || d.Reason != "no policy is loaded" {
			t.Errorf("dry-run without policies: %+v", d)
		}
	}
}

func TestHTTPOnlyOpensForRequests(t *testing.T) {
	e := engine(t, `permit(principal == Workload::"`+curl+`", action == Action::"GET", resource == Service::"`+nginx+`")
		when { context.request.path like "/public/*" };`)
	s := open(t, e, meshed(curl, nginx))
	if !s.HTTPOnly() {
		t.Fatal("not HTTP-only")
	}
	want(t, connect(t, s), authz.Permit)
	want(t, request(t, s, "GET", "/public/a"), authz.Permit)
	want(t, request(t, s, "GET", "/public/a"), authz.Permit)
	want(t, request(t, s, "GET", "/public/../secret"), authz.Deny)
	want(t, request(t, s, "GET", "/%70ublic/a"), authz.Permit)
	want(t, request(t, s, "POST", "/public/a"), authz.Deny)
	want(t, request(t, s, "get", "/public/a"), authz.Deny)
	other := open(t, e, meshed(redis, nginx))
	want(t, connect(t, other), authz.Deny)
}
