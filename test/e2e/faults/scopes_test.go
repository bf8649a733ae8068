package faults_test

import (
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/test/nettest"
)

// A scope comes, changes and goes at run time, as often as one likes, and what it
// was is undone each time.
func TestScopeLifecycle(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		w, other := newSite(t), newSite(t).in(a, "enforce")
		far, otherFar := w.listen("192.0.2.2:80"), other.listen("192.0.2.2:80")
		thief := job{To: "192.0.2.2:80"}
		for range 2 { // enrol, un-enrol, and once more
			a.must("scope", "add", w.name, "--netns", w.host.Path, "--mode", "enforce")
			w.isRefused("thief", thief, far)
			w.passes("shop", thief, far)
			if sc := a.scope(w.name); !sc.Protected || len(sc.Problems) != 0 {
				t.Errorf("an enforcing scope: %+v", sc)
			}
			for _, mode := range []string{"dry-run", "watch", "enforce", "watch", "dry-run", "enforce"} {
				a.must("scope", "mode", w.name, mode)
				if mode == "enforce" {
					w.isRefused("thief", thief, far)
				} else {
					w.passes("thief", thief, far)
				}
				if sc := a.scope(w.name); sc.Mode.String() != mode || sc.Protected != (mode == "enforce") {
					t.Errorf("after mode %s: %+v", mode, sc)
				}
			}
			other.isRefused("thief", thief, otherFar)
			a.must("scope", "remove", w.name)
			w.passes("thief", thief, far)
			w.wantNothingLeft()
			other.isRefused("thief", thief, otherFar)
		}
		a.decided(other.name, "a refusal in the other scope", func(d decisionlog.Record) bool { return d.Effect.String() == "deny" })
	})
}

// wantNothingLeft fails if the host shows that it once was a scope.
func (w *site) wantNothingLeft() {
	w.t.Helper()
	if rules := w.rules(); rules != "" {
		w.t.Errorf("rules are left: %s", rules)
	}
	for _, port := range []string{"15001", "15006", "15008"} {
		for _, host := range []string{"127.0.0.1", "::1"} {
			err := w.host.Do(func() error {
				l, err := net.Listen("tcp", net.JoinHostPort(host, port))
				if err == nil {
					l.Close()
				}
				return err
			})
			if err != nil {
				w.t.Errorf("port %s is not free: %v", port, err)
			}
		}
	}
}

// What cannot be a scope is refused with a reason, and changes nothing.
func TestBadScopes(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		w := newSite(t).in(a, "enforce")
		before := len(a.status().Scopes)
		for name, c := range map[string]struct {
			args []string
			says string
		}{
			"name taken":         {[]string{"add", w.name, "--netns", w.stranger.Path}, "exists"},
			"namespace taken":    {[]string{"add", "again", "--netns", w.host.Path}, "already covers"},
			"no namespace":       {[]string{"add", "x"}, "exactly one of"},
			"two namespaces":     {[]string{"add", "x", "--netns", w.stranger.Path, "--host"}, "exactly one of"},
			"not there":          {[]string{"add", "x", "--netns", "/run/netns/rff-none"}, "rff-none"},
			"not a namespace":    {[]string{"add", "x", "--netns", "/etc/hostname"}, "/etc/hostname"},
			"relative path":      {[]string{"add", "x", "--netns", "run/netns/x"}, "absolute"},
			"dead process":       {[]string{"add", "x", "--pid", "4194303"}, "4194303"},
			"negative process":   {[]string{"add", "x", "--pid", "-1"}, "negative"},
			"mode":               {[]string{"add", "x", "--netns", w.stranger.Path, "--mode", "strict"}, "strict"},
			"loopback":           {[]string{"add", "x", "--netns", w.stranger.Path, "--loopback", "maybe"}, "maybe"},
			"cgroups in a netns": {[]string{"add", "x", "--netns", w.stranger.Path, "--cgroups", "/a"}, "host scope"},
			"name":               {[]string{"add", "../x", "--netns", w.stranger.Path}, "../x"},
			"remove unknown":     {[]string{"remove", "x"}, "not found"},
			"mode of unknown":    {[]string{"mode", "x", "enforce"}, "not found"},
			"unknown mode":       {[]string{"mode", w.name, "strict"}, "strict"},
		} {
			out, code := a.command(append([]string{"scope"}, c.args...)...)
			if code == 0 || !strings.Contains(out, c.says) {
				t.Errorf("%s: exit code %d: %s", name, code, out)
			}
		}
		if now := len(a.status().Scopes); now != before {
			t.Errorf("%d scopes were %d", now, before)
		}
		if sc := a.scope(w.name); !sc.Protected {
			t.Errorf("the scope that was there: %+v", sc)
		}
	})
}

// A connection that was open before is told of, and the scope does not count as
// protected while it is.
func TestOpenBefore(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		old := launch(t, w.host, "thief", job{To: "192.0.2.2:80", Hold: true})
		was := old.next()
		if was.Got != "app" {
			t.Fatal(was)
		}
		served := w.serve("open", "192.0.2.1:8080")
		caller := make(chan struct{})
		c := w.connect("192.0.2.1:8080")
		close(caller)
		served.next()
		w.in(a, "enforce")
		sc := a.scope(w.name)
		if sc.Protected || len(sc.Uncovered) != 2 {
			t.Errorf("with two connections from before: %+v", sc)
		}
		for _, u := range sc.Uncovered {
			if u.Local == was.Self && (u.Remote != "192.0.2.2:80" || u.PID != uint32(old.cmd.Process.Pid) || u.Reason == "") {
				t.Errorf("uncovered: %+v; the process is %d", u, old.cmd.Process.Pid)
			}
		}
		out, _ := a.command("doctor", "--config", filepath.Join(a.Dir, "agent.yaml"))
		if !strings.Contains(out, "uncovered") {
			t.Errorf("doctor is silent on it: %s", out)
		}
		far.clients()
		w.isRefused("thief", job{To: "192.0.2.2:80"}, far) // a new one of the same program
		if r := old.goOn(); r.Step != "" {
			t.Errorf("the old connection was cut: %v", r)
		}
		c.Close()
		nettest.Wait(t, "the scope to be protected once they are gone", func() bool { return a.scope(w.name).Protected })
	})
}

// connect dials from the stranger's namespace and waits for the service's first word.
func (w *site) connect(addr string) net.Conn {
	w.t.Helper()
	var c net.Conn
	err := w.stranger.Do(func() (err error) {
		c, err = net.Dial("tcp", addr)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	if n, err := c.Read(make([]byte, 10)); n == 0 {
		w.t.Fatal(err)
	}
	return c
}

// A namespace without IPv6 is protected without it. When IPv6 appears later, it is
// captured, or refused and told of: never open and called protected.
func TestIPv6AppearsLater(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		w := newSite(t)
		const off = "net.ipv6.conf.all.disable_ipv6="
		w.host.Exec(t, "sysctl", "-qw", off+"1")
		w.in(a, "enforce")
		far4, far6 := w.listen("192.0.2.2:80"), w.listen("[2001:db8::2]:80")
		w.passes("shop", job{To: "192.0.2.2:80"}, far4)
		w.isRefused("thief", job{To: "192.0.2.2:80"}, far4)
		if sc := a.scope(w.name); !sc.Protected {
			t.Errorf("without IPv6: %+v", sc)
		}
		w.host.Exec(t, "sysctl", "-qw", off+"0")
		w.host.Exec(t, "ip", "-6", "addr", "add", "2001:db8::1/64", "dev", w.dev, "nodad")
		served := w.serve("thief", "[2001:db8::1]:8080")
		w.isRefused("thief", job{To: "[2001:db8::2]:80", Wait: 3 * time.Second}, far6)
		if got, _ := w.ask("[2001:db8::1]:8080"); got != "" {
			t.Errorf("a service that nobody may dial answers over IPv6: %q", got)
		}
		served.end()
		nettest.Wait(t, "IPv6 to work, or to be told of", func() bool {
			return !a.scope(w.name).Protected || w.run("shop", job{To: "[2001:db8::2]:80", Wait: 3 * time.Second}).Got == "app"
		})
	})
}

// Loopback between the programs of a namespace is decided, or recorded, or left alone.
func TestLoopback(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		for _, setting := range []string{"enforce", "observe", "ignore"} {
			t.Run(setting, func(t *testing.T) {
				w := newSite(t).in(a, "enforce", "--loopback", setting)
				w.serve("closed", "127.0.0.1:8090")
				w.serve("closed", "0.0.0.0:8080")
				w.serve("closed", "[::1]:8080")
				for _, to := range []string{"127.0.0.1:8080", "127.1.2.3:8080", "192.0.2.1:8080", "[::1]:8080", "0.0.0.0:8080"} {
					if r := w.run("shop", job{To: to}); r.Got != "app" {
						t.Errorf("shop dials %s: %v", to, r)
					}
					if r := w.run("thief", job{To: to}); (r.Got == "app") == (setting == "enforce") {
						t.Errorf("thief dials %s: %v", to, r)
					}
				}
				seen := func(o admin.Observation) bool {
					return o.Scope == w.name && strings.HasPrefix(o.Workload, "thief") && strings.HasPrefix(o.Peer, "127.0.0.1:80")
				}
				switch setting {
				case "enforce":
					a.in(t).decided(w.name, "the thief's refusal", func(d decisionlog.Record) bool {
						return d.Unit == "thief.service" && d.Effect.String() == "deny"
					})
				case "observe":
					// Held, because without hooks socket tables are sampled.
					held := launch(t, w.host, "thief", job{To: "127.0.0.1:8090", Hold: true})
					if r := held.next(); r.Got != "app" {
						t.Error(r)
					}
					nettest.Wait(t, "the thief to be observed", func() bool { return anyOf(a.in(t).status().Observations, seen) })
				case "ignore":
					if anyOf(a.in(t).status().Observations, seen) {
						t.Error("what is to be ignored was recorded")
					}
				}
			})
		}
	})
}

func anyOf[T any](list []T, is func(T) bool) bool {
	for _, x := range list {
		if is(x) {
			return true
		}
	}
	return false
}

// A scope may be named by a process, and lives on when that ends.
func TestScopeByProcess(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		p := launch(t, w.host, "shop", job{To: "192.0.2.2:80", Pause: true})
		p.next()
		a.must("scope", "add", w.name, "--pid", strconv.Itoa(p.cmd.Process.Pid), "--mode", "enforce")
		t.Cleanup(func() { a.in(t).must("scope", "remove", w.name) })
		p.end()
		w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
		w.passes("shop", job{To: "192.0.2.2:80"}, far)
		if sc := a.scope(w.name); !sc.Protected {
			t.Errorf("%+v", sc)
		}
	})
}
