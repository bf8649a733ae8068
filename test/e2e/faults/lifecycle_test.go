package faults_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"ringfence.dev/bpf"
	"ringfence.dev/test/nettest"
)

// downScope is one scope of an agent that will be hurt.
type downScope struct {
	*site
	far    *far
	opens  bool // passes while the agent is down
	member bool // its traffic is relayed while the agent is up
}

// downScopes are one scope of each mode, in the settings of one agent.
func downScopes(t *testing.T, capture string) (*agentProc, map[string]*downScope) {
	t.Helper()
	all := map[string]*downScope{
		"enforce":      {member: true},
		"enforce-open": {member: true, opens: true},
		"dry-run":      {member: true, opens: true},
		"watch":        {opens: true},
	}
	var list []scopeSettings
	for name, s := range all {
		s.site = newSite(t)
		s.name = name
		s.far = s.listen("192.0.2.2:80")
		scope := scopeSettings{"name": name, "netns": s.host.Path, "mode": name}
		if name == "enforce-open" {
			scope["mode"], scope["on_agent_down"] = "enforce", "open"
		}
		list = append(list, scope)
		s.serve("open", "192.0.2.1:8080")
	}
	return newAgent(t, settings{"capture": capture, "scopes": list}), all
}

// wantUp fails unless everything works as with a live agent.
func (s *downScope) wantUp() {
	s.t.Helper()
	nettest.Wait(s.t, s.name+": permitted traffic to pass", func() bool {
		got, _ := s.ask("192.0.2.1:8080")
		return s.run("shop", job{To: "192.0.2.2:80"}).Got == "app" && got == "app"
	})
	s.far.clients()
	if s.name == "enforce" {
		s.isRefused("thief", job{To: "192.0.2.2:80"}, s.far)
	}
}

// wantDown waits until the scope is in the state it has without an agent, and
// fails when an enforcing one let anything through on the way.
func (s *downScope) wantDown() {
	s.t.Helper()
	if !s.opens {
		s.isRefused("thief", job{To: "192.0.2.2:80"}, s.far)
		s.isRefused("shop", job{To: "192.0.2.2:80"}, s.far)
		if got, err := s.ask("192.0.2.1:8080"); got != "" || err == nil {
			s.t.Errorf("%s: a service answered %q while the agent is down", s.name, got)
		}
		return
	}
	nettest.Wait(s.t, s.name+": traffic to pass without the agent", func() bool {
		got, _ := s.ask("192.0.2.1:8080")
		return s.run("thief", job{To: "192.0.2.2:80"}).Got == "app" && got == "app"
	})
	s.far.clients()
}

// A killed agent leaves each scope as its mode says, and the next one finds all as it was.
func TestKilledAgent(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a, scopes := downScopes(t, capture)
		extra := newSite(t)
		extra.in(a, "enforce") // added at run time: the next agent must know of it
		farAway := extra.listen("192.0.2.2:80")
		scopes["extra"] = &downScope{site: extra, far: farAway}
		held := launch(t, scopes["enforce"].host, "shop", job{To: "192.0.2.2:80", Hold: true})
		if r := held.next(); r.Got != "app" {
			t.Fatal(r)
		}
		for name, s := range scopes {
			if name != "extra" {
				s.wantUp()
			}
		}
		before := pins(t, capture, a.instance)
		a.signal(unix.SIGKILL)
		held.next() // what it relayed ends with it; the kernel says how
		for _, s := range scopes {
			s.wantDown()
		}
		t.Run("ports stay the agent's", func(t *testing.T) { squat(t, capture, scopes["enforce"]) })
		if after := pins(t, capture, a.instance); !slices.Equal(before, after) {
			t.Errorf("pinned links changed while no agent ran: %v, then %v", before, after)
		}
		a.restart()
		for name, s := range scopes {
			if name != "extra" {
				s.wantUp()
			}
		}
		extra.passes("shop", job{To: "192.0.2.2:80"}, farAway)
		extra.isRefused("thief", job{To: "192.0.2.2:80"}, farAway)
		if after := pins(t, capture, a.instance); !slices.Equal(before, after) {
			t.Errorf("the next agent attached anew instead of taking the links over: %v, then %v", before, after)
		}
		for _, name := range []string{"enforce", extra.name} {
			if sc := a.scope(name); !sc.Protected {
				t.Errorf("scope %s after take-over: %+v", name, sc)
			}
		}
	})
}

// pins are the kernel's ids of an instance's pinned links, sorted.
func pins(t *testing.T, capture, instance string) (ids []link.ID) {
	t.Helper()
	if capture != "ebpf" {
		return nil
	}
	paths, err := filepath.Glob(filepath.Join(bpf.DefaultPinRoot, instance, "links", "*"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no pinned links: %v", err)
	}
	for _, p := range paths {
		l, err := link.LoadPinnedLink(p, nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, info.ID)
	}
	slices.Sort(ids)
	return ids
}

// squat lets local users, root among them, try to take the dead agent's ports: either they cannot,
// or they get nothing of what is captured.
func squat(t *testing.T, capture string, s *downScope) {
	for _, port := range []string{"15001", "15006", "15008"} {
		for _, uid := range []int{0, 65534} {
			for _, host := range []string{"0.0.0.0", "127.0.0.1", "[::]", "[::1]"} {
				r := s.run("squatter", job{Bind: host + ":" + port, Only: true, UID: uid, Reuse: true})
				if capture == "ebpf" && (r.Step != "bind" || r.Errno != unix.EADDRINUSE) {
					t.Errorf("uid %d binds %s:%s: %v", uid, host, port, r)
				}
			}
		}
	}
	if capture == "ebpf" {
		return
	}
	squatter := launch(t, s.host, "squatter", job{Serve: "0.0.0.0:15001", UID: 65534})
	defer squatter.end()
	if r := squatter.next(); r.Step != "" {
		return
	}
	s.isRefused("shop", job{To: "192.0.2.2:80", Send: "secret"}, s.far)
}

// A stopped agent holds its listeners but serves nobody. Past the limit it counts as dead, and it
// comes back when it is continued.
func TestStoppedAgent(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a, scopes := downScopes(t, capture)
		a.signal(unix.SIGSTOP)
		t.Cleanup(func() {
			if pid := a.PID(); pid != 0 {
				_ = unix.Kill(pid, unix.SIGCONT)
			}
		})
		for name, s := range scopes {
			if name != "enforce" {
				s.wantDown()
			}
		}
		// By now the limit has passed, so the refusal comes at once and not by a time-out.
		scopes["enforce"].wantDown()
		a.signal(unix.SIGCONT)
		for _, s := range scopes {
			s.wantUp()
		}
		nettest.Wait(t, "the scope to be protected again", func() bool { return a.scope("enforce").Protected })
	})
}

// Stopping an agent in order opens nothing that it enforced.
func TestStoppedInOrder(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a, scopes := downScopes(t, capture)
		if err := a.Stop(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, s := range scopes {
			s.wantDown()
		}
		if err := a.start(); err != nil {
			t.Fatal(err)
		}
		for _, s := range scopes {
			s.wantUp()
		}
	})
}

// Cleaning up after a dead agent leaves nothing of it in the kernel, and may be done twice.
func TestCleanup(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		rules := w.rules()
		extra := newSite(t)
		a := newAgent(t, settings{"capture": capture, "scopes": []scopeSettings{{"name": "s", "netns": w.host.Path, "mode": "enforce"}}})
		a.must("scope", "add", "extra", "--netns", extra.host.Path, "--mode", "enforce")
		w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
		if capture == "iptables" && w.rules() == rules {
			t.Fatal("no rules were found where there must be some")
		}
		a.signal(unix.SIGKILL)
		for range 2 {
			a.must("agent", "--cleanup", "--config", filepath.Join(a.Dir, "agent.yaml"))
		}
		root, err := bpf.CgroupRoot()
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{
			filepath.Join(bpf.DefaultPinRoot, a.instance), filepath.Join(root, "ringfence-"+a.instance),
			filepath.Join(a.Dir, "state", "scopes.json"),
		} {
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s is left", path)
			}
		}
		for _, x := range []*site{w, extra} {
			if got := x.rules(); got != rules {
				t.Errorf("rules are left:\n%s", got)
			}
		}
		w.passes("thief", job{To: "192.0.2.2:80"}, far)
	})
}

// rules are the packet filter's of the host, without counters and what is empty.
func (w *site) rules() string {
	var kept []string
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		for line := range strings.Lines(w.host.Exec(w.t, tool)) {
			if strings.Contains(line, "RINGFENCE") {
				kept = append(kept, line)
			}
		}
	}
	return strings.Join(kept, "")
}

// A second agent must not take the place of one that lives, wherever its admin socket is.
func TestSecondAgent(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		scope := []scopeSettings{{"name": "s", "netns": w.host.Path, "mode": "enforce"}}
		a := newAgent(t, settings{"capture": capture, "scopes": scope})
		for name, c := range map[string]struct {
			over settings
			says string
		}{
			"same socket":    {settings{"instance": a.instance, "admin": settings{"socket": a.Socket}}, "is running"},
			"other socket":   {settings{"instance": a.instance}, "is running"},
			"other instance": {settings{"scopes": scope}, "port 15001 is taken"},
		} {
			c.over["capture"] = capture
			b := prepareAgent(t, strings.ReplaceAll(name, " ", "-")+"-"+capture, c.over)
			out, code := b.command("agent", "--config", filepath.Join(b.Dir, "agent.yaml"))
			if code == 0 || !strings.Contains(out, c.says) {
				t.Errorf("%s: exit code %d: %s", name, code, out)
			}
			w.passes("shop", job{To: "192.0.2.2:80"}, far)
			w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
			if sc := a.scope("s"); !sc.Protected {
				t.Errorf("%s: the first agent's scope: %+v", name, sc)
			}
			if out, code := b.command("agent", "--cleanup", "--config", filepath.Join(b.Dir, "agent.yaml")); code == 0 && c.over["instance"] == a.instance {
				t.Errorf("%s: cleaned up after an agent that lives: %s", name, out)
			}
			w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
		}
	})
}

// An agent that fails to start, or to start again, opens nothing that was closed before.
func TestFailedStart(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w, other := newSite(t), newSite(t)
		far := w.listen("192.0.2.2:80")
		a := newAgent(t, settings{"capture": capture, "scopes": []scopeSettings{
			{"name": "s", "netns": w.host.Path, "mode": "enforce"},
			{"name": "t", "netns": other.host.Path, "mode": "enforce"},
		}})
		a.signal(unix.SIGKILL)
		if err := a.Stop(context.Background()); err != nil {
			t.Fatal(err)
		}
		config := filepath.Join(a.Dir, "agent.yaml")
		sound, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		for name, broken := range map[string]string{
			"second scope is gone": strings.Replace(string(sound), other.host.Path, "/run/netns/rff-is-not-there", 1),
			"first scope is gone":  strings.Replace(string(sound), w.host.Path, "/run/netns/rff-is-not-there", 1),
		} {
			if err := os.WriteFile(config, []byte(broken), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, code := a.command("agent", "--config", config); code != 1 || !strings.Contains(out, "rff-is-not-there") {
				t.Errorf("%s: exit code %d: %s", name, code, out)
			}
			w.isRefused("shop", job{To: "192.0.2.2:80"}, far)
			w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
		}
		if err := os.WriteFile(config, sound, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := a.start(); err != nil {
			t.Fatal(err)
		}
		w.passes("shop", job{To: "192.0.2.2:80"}, far)
		w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
	})
}
