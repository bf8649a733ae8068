package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/attest"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

// Where a covered cgroup could be made, rules must capture before it is.
func TestMayCoverBelow(t *testing.T) {
	nettest.RequireRoot(t)
	for _, c := range []struct {
		name    string
		s       ScopeSettings
		yes, no []string
	}{
		{"cgroups", ScopeSettings{Cgroups: []string{"/app/*/worker-*"}},
			[]string{"/", "/app", "/app/a"}, []string{"/app/a/worker-1", "/app/a/b", "/application", "/b/app", "/u"}},
		{"one cgroup", ScopeSettings{Cgroups: []string{"/app"}}, []string{"/"}, []string{"/app", "/app/a", "/other"}},
		{"a class with a slash in it", ScopeSettings{Cgroups: []string{"/a/b[/]c/d"}}, []string{"/a", "/a/x"}, []string{"/b"}},
		{"units", ScopeSettings{Units: []string{"web-*.service"}},
			[]string{"/", "/u", "/system.slice", "/user.slice/user-7.slice", "/user.slice/user-7.slice/user@7.service", "/user.slice/user-7.slice/user@7.service/app.slice"},
			[]string{"/u/db.service", "/system.slice/db.service", "/docker/1234", "/u/agent", "/u/agent/x"}},
		{"excepted units", ScopeSettings{Units: []string{"*.service"}, Cgroups: []string{"/u/ssh.service/sub/x"}, ExceptUnits: []string{"ssh.service"}},
			[]string{"/u"}, []string{"/u/ssh.service", "/u/ssh.service/sub"}},
		{"everything", ScopeSettings{}, nil, []string{"/", "/u", "/system.slice"}},
	} {
		cover, _ := coverOf(t, "/u", c.s)
		for _, p := range c.yes {
			if !cover.mayCoverBelow(p) {
				t.Errorf("%s: nothing can be covered below %s", c.name, p)
			}
		}
		for _, p := range c.no {
			if cover.mayCoverBelow(p) {
				t.Errorf("%s: something can be covered below %s", c.name, p)
			}
		}
		cover.watcher.Close()
	}
}

func TestTableTellsWhatMayCome(t *testing.T) {
	dir, _ := nettest.Cgroup(t, "below")
	root := "/" + filepath.Base(dir)
	c, _ := coverOf(t, root+"/units", ScopeSettings{Cgroups: []string{root + "/units/web-*"}})
	defer c.watcher.Close()
	if err := c.makeUnitRoots(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"units/web-1", "units/db", "other"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	table, err := c.table()
	if err != nil {
		t.Fatal(err)
	}
	type verdict struct{ covered, below bool }
	want := map[string]verdict{
		"/": {false, true}, root: {false, true}, root + "/units": {false, true},
		root + "/units/web-1": {true, false}, root + "/units/db": {}, root + "/other": {},
	}
	for _, e := range table {
		if w, ok := want[e.Path]; ok {
			if got := (verdict{e.Covered, e.Below}); got != w {
				t.Errorf("%s: %+v, want %+v", e.Path, got, w)
			}
			delete(want, e.Path)
		}
	}
	if len(want) > 0 {
		t.Errorf("not in the table: %v", want)
	}
	if err := c.makeUnitRoots(); err != nil {
		t.Errorf("a unit root that is there: %v", err)
	}
}

// aloneAgent has a host scope of a scratch namespace, in which only what is below
// one scratch cgroup is covered. Its attestor can name no program of the test's.
func aloneAgent(t *testing.T) (a *Agent, ns *nettest.NS, covered, free string) {
	t.Helper()
	dir, _ := nettest.Cgroup(t, "alone")
	covered, free = filepath.Join(dir, "covered"), filepath.Join(dir, "free")
	for _, d := range []string{covered, free} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c, _ := coverOf(t, "/no-units", ScopeSettings{Cgroups: []string{"/" + filepath.Base(dir) + "/covered"}})
	t.Cleanup(func() { c.watcher.Close() })
	ns = nettest.NetNS(t, "alone")
	td := spiffeid.RequireTrustDomainFromString("lab.test")
	attestor, err := attest.New(attest.Config{TrustDomain: td, Host: "here"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { attestor.Close() })
	a = &Agent{attestor: attestor, scopes: map[string]*scope{"host": {cover: c, ns: handleOf(t, ns)}}}
	a.settings.TrustDomain, a.settings.Host = td, "here"
	return a, ns, covered, free
}

// A listener that is not covered needs no identity: who is captured on the way to it
// is not refused for the lack of one. A covered one does.
func TestOwnerWithoutIdentity(t *testing.T) {
	a, ns, covered, free := aloneAgent(t)
	alone, protected := listenAs(t, ns, free), listenAs(t, ns, covered)
	who, err := identifier{a}.Owner(t.Context(), "host", alone)
	if err != nil || who.ID != a.nodeIdentity().ID {
		t.Errorf("owner of an uncovered port: %v, %v", who.ID, err)
	}
	if who, err := (identifier{a}).Owner(t.Context(), "host", protected); err == nil {
		t.Errorf("owner of a covered port, whose program has no name: %v", who.ID)
	}
	if !a.uncovered(authz.Connection{Scope: "host", Side: authz.Ingress, Destination: authz.Service{Addr: alone}}) {
		t.Error("a connection to an uncovered port is decided")
	}
	// One that listens everywhere may be the one that takes it.
	wild := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), protected.Port())
	if a.uncovered(authz.Connection{Scope: "host", Side: authz.Ingress, Destination: authz.Service{Addr: wild}}) {
		t.Error("a connection to where nobody listens passes undecided")
	}
}

// A caller without identity goes on if it is known to be not covered, and only then.
func TestCallerWithoutIdentity(t *testing.T) {
	a, _, covered, free := aloneAgent(t)
	program := filepath.Join(t.TempDir(), "sleep") // below a directory that others may write: no name
	data, err := os.ReadFile("/bin/sleep")
	if err == nil {
		err = os.WriteFile(program, data, 0o755)
	}
	if err == nil {
		err = os.Chmod(filepath.Dir(program), 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]bool{covered: false, free: true} {
		ev := evidenceIn(t, a, program, dir)
		f := flow.Flow{Scope: "host", Direction: flow.Outbound, Caller: ev}
		who, err := identifier{a}.Caller(t.Context(), f)
		if !errors.Is(err, workload.ErrUnknown) || !who.ID.IsZero() || (who.Exe == program) != want {
			t.Errorf("%s: %+v, %v", dir, who, err)
		}
		c := authz.Connection{Scope: "host", Side: authz.Egress, Source: authz.Peer{PID: ev.PID, Unit: who.Unit, Exe: who.Exe}}
		if got := a.uncovered(c); got != want {
			t.Errorf("%s: undecided %v", dir, got)
		}
		ev.StartTime += 1e9
		if unit, exe := a.scopes["host"].cover.describe(ev); unit != "" || exe != "" {
			t.Errorf("another process that has the number by now is described: %s %s", unit, exe)
		}
	}
}

// evidenceIn runs a program in a cgroup and tells of it what a connection would.
func evidenceIn(t *testing.T, a *Agent, program, dir string) workload.Evidence {
	t.Helper()
	cmd := exec.Command(program, "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	id, err := a.scopes["host"].cover.tree.ID("/" + filepath.Join(filepath.Base(filepath.Dir(dir)), filepath.Base(dir)))
	if err != nil {
		t.Fatal(err)
	}
	h, err := proc.New("").Open(uint32(cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	st, err := h.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return workload.Evidence{Process: st.Process, CgroupID: id, Source: workload.SourceSockDiag}
}

func TestMayTake(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	at := func(addr string, family uint8, only bool) sockdiag.Socket {
		return sockdiag.Socket{Source: netip.AddrPortFrom(netip.MustParseAddr(addr), 80), Family: family, V6Only: only}
	}
	for _, c := range []struct {
		s      sockdiag.Socket
		v4, v6 bool
	}{
		{at("192.0.2.1", 2, false), true, false},
		{at("192.0.2.9", 2, false), false, false},
		{at("0.0.0.0", 2, false), true, false},
		{at("::", 10, false), true, true},
		{at("::", 10, true), false, true},
		{at("2001:db8::1", 10, false), false, true},
	} {
		if mayTake(c.s, v4) != c.v4 || mayTake(c.s, v6) != c.v6 {
			t.Errorf("%v: %v %v", c.s.Source, mayTake(c.s, v4), mayTake(c.s, v6))
		}
	}
}

// Kernels before 5.9 do not tell a socket's cgroup: its holder's counts then.
func TestHomeOfASocketThatDoesNotTell(t *testing.T) {
	a, ns, _, _ := aloneAgent(t)
	l := ns.Listen(t, "127.0.0.1:0")
	s := sockdiag.Socket{Source: l.Addr().(*net.TCPAddr).AddrPort()}
	if id := a.homeOf(context.Background(), a.scopes["host"], s); id != 0 {
		t.Errorf("the home of a program without name: %d", id)
	}
	s.CgroupID = 7
	if id := a.homeOf(context.Background(), a.scopes["host"], s); id != 7 {
		t.Errorf("home %d", id)
	}
}
