package agent

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"ringfence.dev/agent/capture"
	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

// coverOf is a cover of patterns on the machine's own tree, where root is a
// place for units made by the test.
func coverOf(t *testing.T, root string, s ScopeSettings) (*cover, *fakeBackend) {
	t.Helper()
	b := newFake(t)
	a := &Agent{backend: b, leafPath: root + "/agent", settings: Settings{UnitRoots: []string{root}}, log: discard}
	s.Name, s.Host = "host", true
	c, err := a.newCover(s)
	if err != nil {
		t.Fatal(err)
	}
	b.scopes["host"] = capture.Scope{Name: "host"}
	return c, b
}

func TestCovers(t *testing.T) {
	nettest.RequireRoot(t)
	for _, c := range []struct {
		name string
		s    ScopeSettings
		yes  []string
		no   []string
	}{
		{"everything", ScopeSettings{}, []string{"/", "/a", "/u/web.service", "/u/agent-2"}, []string{"/u/agent", "/u/agent/x"}},
		{"units", ScopeSettings{Units: []string{"web-*.service"}}, []string{"/u/web-1.service", "/u/web-1.service/sub"},
			[]string{"/", "/u/web.service", "/web-1", "/u", "/u/agent"}},
		{"except", ScopeSettings{ExceptUnits: []string{"ssh.service"}}, []string{"/", "/u/web.service", "/u/ssh.service.d"}, []string{"/u/ssh.service", "/u/ssh.service/x"}},
		{"except wins", ScopeSettings{Units: []string{"*.service"}, ExceptUnits: []string{"ssh.service"}}, []string{"/u/web.service"}, []string{"/u/ssh.service", "/x"}},
		{"cgroups", ScopeSettings{Cgroups: []string{"/app/*"}}, []string{"/app/a", "/app/a/b"}, []string{"/", "/app", "/application/a"}},
		{"the root, with all below", ScopeSettings{Cgroups: []string{"/"}}, []string{"/", "/a/b"}, []string{"/u/agent"}},
		{"either", ScopeSettings{Cgroups: []string{"/app"}, Units: []string{"web.service"}}, []string{"/app", "/app/x", "/u/web.service"}, []string{"/", "/u/db.service"}},
		{"the agent, even if it is named", ScopeSettings{Cgroups: []string{"/u/agent"}}, nil, []string{"/u/agent"}},
	} {
		cover, _ := coverOf(t, "/u", c.s)
		for _, p := range c.yes {
			if !cover.covers(p) {
				t.Errorf("%s: %s is not covered", c.name, p)
			}
		}
		for _, p := range c.no {
			if cover.covers(p) {
				t.Errorf("%s: %s is covered", c.name, p)
			}
		}
		cover.watcher.Close()
	}
}

// A cgroup that is made later gets into the table by itself, one that goes leaves it.
func TestNewCgroupsAreFollowed(t *testing.T) {
	dir, _ := nettest.Cgroup(t, "cover")
	root := "/" + filepath.Base(dir)
	mkdir := func(name string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mkdir("web.service")
	c, b := coverOf(t, root, ScopeSettings{Units: []string{"web*.service"}})
	if err := c.refresh(); err != nil {
		t.Fatal(err)
	}
	mine := func() map[string]bool {
		table := b.table("host")
		maps.DeleteFunc(table, func(p string, _ bool) bool { return !strings.HasPrefix(p, root+"/") })
		return table
	}
	if got := mine(); !maps.Equal(got, map[string]bool{root + "/web.service": true}) {
		t.Errorf("%v", got)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); c.run(ctx) }()
	mkdir("web-2.service")
	mkdir("db.service")
	nettest.Wait(t, "the new cgroups", func() bool {
		return maps.Equal(mine(), map[string]bool{root + "/web.service": true, root + "/web-2.service": true, root + "/db.service": false})
	})
	mkdir("web-2.service/inner")
	nettest.Wait(t, "a cgroup in a new one", func() bool { return mine()[root+"/web-2.service/inner"] })
	os.Remove(filepath.Join(dir, "web-2.service/inner"))
	os.Remove(filepath.Join(dir, "db.service"))
	nettest.Wait(t, "the removed cgroups", func() bool { return len(mine()) == 2 })
	if text := c.problem(); text != "" {
		t.Error(text)
	}
	cancel()
	<-done
}

// A table that could not be written is a problem that status tells.
func TestCoverProblem(t *testing.T) {
	nettest.RequireRoot(t)
	c, b := coverOf(t, "/u", ScopeSettings{Units: []string{"web.service"}})
	defer c.watcher.Close()
	b.fail["cgroups host"] = os.ErrDeadlineExceeded
	if err := c.refresh(); err == nil || !strings.Contains(c.problem(), "not up to date") {
		t.Errorf("%v, problem %q", err, c.problem())
	}
	delete(b.fail, "cgroups host")
	if err := c.refresh(); err != nil || c.problem() != "" {
		t.Errorf("%v, problem %q", err, c.problem())
	}
}

// Programs of an excepted unit pass undecided, and nobody else does: not a process
// that only has the number of one, and not one that talks to a covered service.
func TestUncoveredCaller(t *testing.T) {
	dir, _ := nettest.Cgroup(t, "caller")
	root := "/" + filepath.Base(dir)
	for _, name := range []string{"ssh.service", "web.service"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c, _ := coverOf(t, root, ScopeSettings{ExceptUnits: []string{"ssh.service"}})
	defer c.watcher.Close()
	ns := nettest.NetNS(t, "caller")
	at := listenAs(t, ns, filepath.Join(dir, "ssh.service"))
	covered := listenAs(t, ns, filepath.Join(dir, "web.service"))
	a := &Agent{scopes: map[string]*scope{"host": {cover: c, ns: handleOf(t, ns)}}}
	ssh, web := runIn(t, filepath.Join(dir, "ssh.service")), runIn(t, filepath.Join(dir, "web.service"))
	exe, err := os.Readlink("/proc/" + strconv.Itoa(int(ssh)) + "/exe")
	if err != nil {
		t.Fatal(err)
	}
	excepted := authz.Peer{PID: ssh, Unit: "ssh.service", Exe: exe}
	to := func(addr netip.AddrPort) authz.Service { return authz.Service{Addr: addr} }
	for _, k := range []struct {
		name string
		c    authz.Connection
		want bool
	}{
		{"excepted", authz.Connection{Source: authz.Peer{PID: ssh, Unit: "ssh.service", Exe: exe}}, true},
		{"covered", authz.Connection{Source: authz.Peer{PID: web, Unit: "web.service", Exe: exe}}, false},
		{"was of another unit", authz.Connection{Source: authz.Peer{PID: ssh, Unit: "web.service", Exe: exe}}, false},
		{"was another program", authz.Connection{Source: authz.Peer{PID: ssh, Unit: "ssh.service", Exe: "/bin/other"}}, false},
		{"gone", authz.Connection{Source: authz.Peer{PID: 4194399, Unit: "ssh.service", Exe: exe}}, false},
		{"unknown", authz.Connection{Source: authz.Peer{}}, false},
		{"to an excepted service", authz.Connection{Side: authz.Ingress, Destination: to(at)}, true},
		{"to a covered service", authz.Connection{Side: authz.Ingress, Source: excepted, Destination: to(covered)}, false},
		{"to where nobody listens", authz.Connection{Side: authz.Ingress, Destination: to(netip.MustParseAddrPort("127.0.0.1:1"))}, false},
		{"between two of them", authz.Connection{Side: authz.Local, Source: excepted, Destination: to(at)}, true},
		{"from one to a covered service here", authz.Connection{Side: authz.Local, Source: excepted, Destination: to(covered)}, false},
		{"from a covered one", authz.Connection{Side: authz.Local, Source: authz.Peer{PID: web, Unit: "web.service", Exe: exe}, Destination: to(at)}, false},
	} {
		k.c.Scope = "host"
		if got := a.uncovered(k.c); got != k.want {
			t.Errorf("%s: %v", k.name, got)
		}
	}
	if a.uncovered(authz.Connection{Scope: "other", Source: authz.Peer{PID: ssh, Unit: "ssh.service", Exe: exe}}) {
		t.Error("a scope that is not there lets callers off")
	}
}

// runIn runs a program in a cgroup until the test ends.
func runIn(t *testing.T, dir string) uint32 {
	t.Helper()
	cmd := exec.Command("/bin/sleep", "600")
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
	return uint32(cmd.Process.Pid)
}

// listenAs listens as a program of a cgroup would: a socket is of the cgroup that
// it was made in.
func listenAs(t *testing.T, ns *nettest.NS, dir string) netip.AddrPort {
	t.Helper()
	home, err := ownCgroup()
	if err != nil {
		t.Fatal(err)
	}
	move := func(dir string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	move(dir)
	defer move(filepath.Join(nettest.CgroupRoot(t), home))
	return ns.Listen(t, "127.0.0.1:0").Addr().(*net.TCPAddr).AddrPort()
}
