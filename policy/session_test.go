package policy_test

import (
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

func memoryLog(tb testing.TB) *decisionlog.Log {
	tb.Helper()
	log, err := decisionlog.New(decisionlog.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	return log
}

func TestEveryDecisionIsRecordedOnce(t *testing.T) {
	log := memoryLog(t)
	e := engineOf(t, policy.Config{Log: log, Dir: write(t, "p.cedar",
		permitAll+`@id("no-delete") forbid(principal, action == Action::"DELETE", resource in Service::"`+nginx+`");`)})
	c := meshed(curl, nginx)
	c.Source.Unit, c.Source.Exe, c.Source.PID, c.Source.UID = "curl.service", "/usr/bin/curl", 77, 1000
	s := open(t, e, c)
	if len(log.Find(c.ID)) != 0 {
		t.Error("opening recorded something")
	}
	for range 3 {
		want(t, connect(t, s), authz.Permit)
	}
	want(t, request(t, s, "GET", "/a?token=secret"), authz.Permit)
	d := request(t, s, "DELETE", "/a")
	want(t, d, authz.Deny)
	refusal := s.Refuse("not HTTP")
	want(t, refusal, authz.Deny)
	records := log.Find(c.ID)
	if len(records) != 4 {
		t.Fatalf("%d records", len(records))
	}
	for i, r := range records {
		if int(r.ID.Seq) != i || r.ID.Conn != c.ID.Conn {
			t.Errorf("record %d has id %v", i, r.ID)
		}
		if r.Principal != curl || r.Resource != nginx || r.Unit != "curl.service" || r.PID != 77 || r.UID != 1000 ||
			r.Version != e.Version() || r.Source != c.Source.Addr || r.Destination != c.Destination.Addr || !r.Mesh {
			t.Errorf("record %d: %+v", i, r)
		}
		if strings.Contains(r.Path+r.Reason+r.Host, "secret") {
			t.Errorf("a query was recorded: %+v", r)
		}
	}
	if r := log.Find(d.ID)[0]; r.Method != "DELETE" || r.Path != "/a" || r.Host != "nginx.lab.test" || r.Policies[0] != "no-delete" || r.Action != "DELETE" {
		t.Errorf("%+v", r)
	}
	if r := log.Find(refusal.ID)[0]; r.Action != "refuse" || r.Reason != "not HTTP" {
		t.Errorf("%+v", r)
	}
	if st := e.Status(); st.Permits != 2 || st.Denies != 2 {
		t.Errorf("%+v", st)
	}
}

// A cached answer must be the caller's own: another caller, service, address or
// way in is another question.
func TestCacheKeepsQuestionsApart(t *testing.T) {
	e := engine(t, `permit(principal == Workload::"`+curl+`", action == Action::"GET", resource == Service::"`+nginx+`")
		when { context.mesh && context.src_ip == ip("192.0.2.1") && context.request.host == "nginx.lab.test" && resource.port == 80 };`)
	ask := func(change func(*authz.Connection), r authz.Request) authz.Effect {
		c := meshed(curl, nginx)
		c.Mode = authz.DryRun // so that requests are asked even where the connection is refused
		change(&c)
		d, err := open(t, e, c).Request(&r)
		if err != nil {
			t.Fatal(err)
		}
		return d.Effect
	}
	base := authz.Request{Method: "GET", Target: "/a", Host: "nginx.lab.test"}
	for range 3 {
		if got := ask(func(*authz.Connection) {}, base); got != authz.Permit {
			t.Fatalf("base: %v", got)
		}
		for name, change := range map[string]func(*authz.Connection){
			"caller":    func(c *authz.Connection) { c.Source.ID = c.Destination.ID },
			"anonymous": func(c *authz.Connection) { c.Source.ID = meshed("", nginx).Source.ID },
			"source":    func(c *authz.Connection) { c.Source.Addr = c.Destination.Addr },
			"plaintext": func(c *authz.Connection) { c.Mesh = false },
			"port":      func(c *authz.Connection) { c.Destination.Addr = c.Source.Addr },
		} {
			if got := ask(change, base); got != authz.WouldDeny {
				t.Errorf("%s: %v", name, got)
			}
		}
		for _, r := range []authz.Request{
			{Method: "GET", Target: "/a", Host: "other.test"},
			{Method: "POST", Target: "/a", Host: base.Host},
			{Method: "GET", Target: "/%2f", Host: base.Host},
			{Method: "GET", Target: "/a", Host: base.Host, Upgrade: "h2c"},
		} {
			if got := ask(func(*authz.Connection) {}, r); got != authz.WouldDeny {
				t.Errorf("%+v: %v", r, got)
			}
		}
	}
}

// The strings of a request are the caller's buffer, which changes after the call.
func TestRequestStringsAreNotKept(t *testing.T) {
	e := engine(t, `permit(principal, action == Action::"GET", resource) when { context.request.path == "/a" };`)
	s := open(t, e, meshed(curl, nginx))
	buf := []byte("/a")
	want(t, request(t, s, "GET", unsafeString(buf)), authz.Permit)
	copy(buf, "/b")
	want(t, request(t, s, "GET", unsafeString(buf)), authz.Deny)
	want(t, request(t, s, "GET", "/a"), authz.Permit)
	want(t, request(t, s, "GET", "/b"), authz.Deny)
}

func TestConnectAfterReload(t *testing.T) {
	log := memoryLog(t)
	dir := write(t, "p.cedar", permitAll)
	e := engineOf(t, policy.Config{Dir: dir, Log: log})
	c := meshed(curl, nginx)
	s := open(t, e, c)
	want(t, connect(t, s), authz.Permit)
	first, changed := e.Version(), e.Changed()

	put(t, filepath.Join(dir, "q.cedar"), `forbid(principal == Workload::"`+curl+`", action == Action::"connect", resource);`)
	if err := e.Reload(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody was told of the change")
	}
	want(t, connect(t, s), authz.Deny)
	want(t, request(t, s, "GET", "/"), authz.Deny)
	want(t, connect(t, s), authz.Deny)
	records := log.Find(authz.ID{Conn: c.ID.Conn})
	if len(records) != 3 || records[0].Version != first || records[1].Version == first {
		t.Errorf("records: %+v", records)
	}
	// The old decision is still explained by the policies that made it.
	if x := e.Explain(records[0]); !x.Exact || x.Version != first || len(x.Policies) != 1 {
		t.Errorf("%+v", x)
	}
	records[0].Version = "0000"
	if x := e.Explain(records[0]); x.Exact || x.Version != e.Version() {
		t.Errorf("%+v", x)
	}
}

// A connection that was opened for anything must not outlive the moment from
// which its service takes decided requests only.
func TestServiceBecomesHTTPOnly(t *testing.T) {
	dir := write(t, "p.cedar", permitAll)
	e := engineOf(t, policy.Config{Dir: dir})
	sessions := map[string]authz.Session{}
	for _, name := range []string{"opaque", "egress", "http", "dry-run"} {
		c := meshed(curl, nginx)
		switch name {
		case "egress":
			c.Side = authz.Egress
		case "dry-run":
			c.Mode = authz.DryRun
		}
		sessions[name] = open(t, e, c)
		want(t, connect(t, sessions[name]), authz.Permit)
	}
	want(t, request(t, sessions["http"], "GET", "/"), authz.Permit)
	put(t, filepath.Join(dir, "q.cedar"), `forbid(principal, action == Action::"DELETE", resource in Service::"`+nginx+`");`)
	if err := e.Reload(); err != nil {
		t.Fatal(err)
	}
	for name, effect := range map[string]authz.Effect{
		"opaque": authz.Deny, "egress": authz.Permit, "http": authz.Permit, "dry-run": authz.WouldDeny,
	} {
		t.Log(name)
		want(t, connect(t, sessions[name]), effect)
		want(t, connect(t, sessions[name]), effect)
	}
	want(t, request(t, sessions["http"], "DELETE", "/"), authz.Deny)
	want(t, connect(t, open(t, e, meshed(curl, nginx))), authz.Permit)
}

func TestReloadKeepsTheLastGoodOnes(t *testing.T) {
	dir := write(t, "p.cedar", permitAll)
	e := engineOf(t, policy.Config{Dir: dir})
	good := e.Version()
	for _, bad := range []string{"permit(", "", `permit(principal == User::"x", action, resource);`} {
		put(t, filepath.Join(dir, "q.cedar"), bad)
		err := e.Reload()
		if _, ok := errors.AsType[*policy.ProblemsError](err); !ok {
			t.Fatalf("%q: %v", bad, err)
		}
		if st := e.Status(); st.Version != good || st.LastError != err.Error() || st.LastErrorAt.IsZero() {
			t.Errorf("%q: %+v", bad, st)
		}
		want(t, connect(t, open(t, e, meshed(curl, nginx))), authz.Permit)
	}
	put(t, filepath.Join(dir, "q.cedar"), "// nothing")
	if err := e.Reload(); err != nil {
		t.Fatal(err)
	}
	st := e.Status()
	if st.LastError != "" || st.ReloadFailures != 3 || st.Reloads != 0 {
		t.Errorf("%+v", st)
	}
}

// failingLog takes nothing.
type failingLog struct{}

func (failingLog) Record(*decisionlog.Record) error { return decisionlog.ErrNotRecorded }

func TestUnrecordedDecisions(t *testing.T) {
	dir := write(t, "p.cedar", permitAll)
	for _, refuse := range []bool{false, true} {
		for mode, effect := range map[authz.Mode]authz.Effect{authz.Enforce: authz.Deny, authz.DryRun: authz.Permit} {
			e := engineOf(t, policy.Config{Dir: dir, Log: failingLog{}, RefuseUnrecorded: refuse})
			if !refuse {
				effect = authz.Permit
			}
			c := meshed(curl, nginx)
			c.Mode = mode
			s := open(t, e, c)
			want(t, connect(t, s), effect)
			want(t, request(t, s, "GET", "/"), effect)
			if n := e.Status().Unrecorded; n != 2 {
				t.Errorf("%d unrecorded", n)
			}
		}
	}
}

func TestOpenNeedsAddresses(t *testing.T) {
	e := engine(t, permitAll)
	c := meshed(curl, nginx)
	c.Destination.Addr = authz.Service{}.Addr
	if _, err := e.Open(c); err == nil {
		t.Error("opened without a destination")
	}
	c = meshed(curl, nginx)
	c.Source.Addr = authz.Peer{}.Addr
	if _, err := e.Open(c); err == nil {
		t.Error("opened without a source")
	}
}

// While policies change, each decision is that of one whole set. The two sets
// disagree in everything; a mixture would permit what neither does.
func TestOneSnapshotDecides(t *testing.T) {
	sets := []string{
		`@id("a") permit(principal, action == Action::"GET", resource) when { context.request.path == "/a" };`,
		`@id("b") permit(principal, action == Action::"GET", resource) when { context.request.path == "/b" };`,
	}
	dir := write(t, "p.cedar", sets[0])
	log := memoryLog(t)
	e := engineOf(t, policy.Config{Dir: dir, Log: log})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			s := open(t, e, meshed(curl, nginx))
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, p := range []string{"/a", "/b"} {
					d := request(t, s, "GET", p)
					if d.Effect == authz.Permit && d.Policies[0] != p[1:] {
						t.Errorf("%s permitted by %v", p, d.Policies)
					}
				}
			}
		})
	}
	versions := map[string]bool{}
	for i := range 40 {
		put(t, filepath.Join(dir, "p.cedar"), sets[i%2])
		if err := e.Reload(); err != nil {
			t.Error(err)
		}
		versions[e.Version()] = true
	}
	close(stop)
	wg.Wait()
	if len(versions) != 2 {
		t.Errorf("%d versions", len(versions))
	}
}

func unsafeString(b []byte) string { return unsafe.String(&b[0], len(b)) }

func addrPort(ip string, port int) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(ip), uint16(port))
}

func TestRepeatedRequestsDoNotAllocate(t *testing.T) {
	s := open(t, engineOf(t, policy.Config{Log: memoryLog(t), Dir: write(t, "p.cedar", manyPolicies(100))}), meshed(curl, nginx))
	r := authz.Request{Method: "GET", Target: "/api/orders/7?x=y", Host: "nginx.lab.test"}
	for range 3 * decisionlog.DefaultKeep {
		want(t, must(s.Request(&r)), authz.Permit)
	}
	if n := testing.AllocsPerRun(1000, func() { must(s.Request(&r)) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
