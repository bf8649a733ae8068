package faults_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/test/nettest"
)

// hostAgent is an agent whose host is a site's, with two of its cgroups enforced.
func hostAgent(t *testing.T, w *site, capture string) *agentProc {
	t.Helper()
	a := newAgentIn(t, w.host, settings{"capture": capture, "scopes": []scopeSettings{{
		"name": "host", "host": true, "mode": "enforce", "loopback": "enforce",
		"cgroups": []string{unitRoot + "/shop.service", unitRoot + "/web*.service"},
	}}})
	w.name = "host"
	return a
}

// Two cgroups of a host are enforced, and everything else of it goes on as if
// there were no agent, in both directions: an administrator must not lock himself out.
func TestHostScopeLeavesOthersAlone(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		before := w.serve("sshd", "0.0.0.0:22")
		before6 := w.serve("sshd6", "[::]:2222")
		a := hostAgent(t, w, capture)
		after := w.serve("sshd", "0.0.0.0:23")
		w.serve("web", "192.0.2.1:8080")
		w.serve("web", "127.0.0.1:8081")

		for addr, p := range map[string]*proc{
			"192.0.2.1:22": before, "192.0.2.1:23": after, "[2001:db8::1]:2222": before6, "192.0.2.1:2222": before6,
		} {
			if got, err := w.ask(addr); got != "app" {
				t.Errorf("a stranger dials the uncovered %s: %q, %v", addr, got, err)
				continue
			}
			peer := p.next().Peer
			// A packet filter's rules learn of a new listener by sampling. Until then the agent carries
			// on what arrives, undecided, and the server sees the agent's address.
			if capture == "iptables" && p == after && strings.HasPrefix(peer, "192.0.2.1:") {
				nettest.Wait(t, "the new listener to be left alone by the rules", func() bool {
					_, _ = w.ask(addr)
					peer = p.next().Peer
					return !strings.HasPrefix(peer, "192.0.2.1:")
				})
			}
			if !strings.HasPrefix(peer, "192.0.2.2:") && !strings.HasPrefix(peer, "[2001:db8::2]:") {
				t.Errorf("the uncovered %s sees its client as %s", addr, peer)
			}
		}
		w.passes("admin", job{To: "192.0.2.2:80"}, far)
		for _, to := range []string{"127.0.0.1:22", "127.0.0.1:23", "192.0.2.1:22", "[::1]:2222"} {
			if r := w.run("admin", job{To: to}); r.Got != "app" {
				t.Errorf("an uncovered program dials the uncovered %s: %v", to, r)
			}
			if r := w.run("shop", job{To: to}); r.Got != "app" {
				t.Errorf("the shop dials the uncovered %s: %v", to, r)
			}
		}
		for _, d := range a.decisions("host") {
			if d.Unit != "shop.service" {
				t.Errorf("decided for what is not covered: %+v", d)
			}
		}

		w.passes("shop", job{To: "192.0.2.2:80"}, far)
		w.isRefused("web", job{To: "192.0.2.2:80"}, far)
		if got, _ := w.ask("192.0.2.1:8080"); got != "" {
			t.Errorf("a stranger is served by a covered service: %q", got)
		}
		for _, to := range []string{"192.0.2.1:8080", "127.0.0.1:8081"} {
			if r := w.run("admin", job{To: to}); r.Got != "" {
				t.Errorf("an uncovered program, which is nobody, is served by the covered %s", to)
			}
			if r := w.run("web2", job{To: to}); r.Got != "" {
				t.Errorf("a covered program without a permit is served by the covered %s", to)
			}
			if r := w.run("shop", job{To: to}); r.Got != "app" {
				t.Errorf("the shop dials the covered %s: %v", to, r)
			}
		}
		if sc := a.scope("host"); !sc.Protected {
			t.Errorf("%+v", sc)
		}
	})
}

// A cgroup that comes later is covered from its first connection on.
func TestHostScopeCoversNewCgroups(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		hostAgent(t, w, capture)
		for i := range 5 {
			covered, other := fmt.Sprintf("web-new-%s-%d", capture, i), fmt.Sprintf("other-new-%s-%d", capture, i)
			w.isRefused(covered, job{To: "192.0.2.2:80"}, far)
			w.passes(other, job{To: "192.0.2.2:80"}, far)
		}
	})
}

// Sockets that change hands do not get out of a host scope, as far as doctor says that they do not.
func TestHostScopeBypass(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		hostAgent(t, w, capture)
		to := job{To: "192.0.2.2:80"}
		web, admin := unitDir(t, "web"), unitDir(t, "admin")
		w.run("web", job{To: "192.0.2.2:80"})
		w.run("admin", job{To: "192.0.2.2:80"})
		far.clients()

		if capture == "iptables" {
			// Who made the socket counts, not who uses it; doctor says so.
			out := to
			out.Join = admin
			w.isRefused("web", out, far)
			return
		}
		in := to
		in.Join = web
		w.isRefused("admin", in, far)
		given := to
		given.Given = true
		w.isRefused("web", given, far, socketIn(t, w.host))
	})
}

// Exceptions by unit hold against a pattern that covers all.
func TestHostScopeExceptUnits(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		a := newAgentIn(t, w.host, settings{"capture": capture, "scopes": []scopeSettings{{
			"name": "host", "host": true, "mode": "enforce", "units": []string{"*.service"}, "except_units": []string{"ssh*.service"},
		}}})
		w.name = "host"
		w.serve("sshd", "192.0.2.1:22")
		w.passes("sshd", job{To: "192.0.2.2:80"}, far)
		w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
		w.passes("shop", job{To: "192.0.2.2:80"}, far)
		if got, err := w.ask("192.0.2.1:22"); got != "app" {
			t.Errorf("an excepted service: %q, %v", got, err)
		}
		a.decided("host", "the thief's refusal", func(d decisionlog.Record) bool { return d.Unit == "thief.service" })
	})
}

// An agent without settings watches the host: it names its services and whom they
// talk to, and changes nothing.
func TestWatchPlainHost(t *testing.T) {
	for _, capture := range []string{"auto", "ebpf", "iptables", "observe"} {
		t.Run(capture, func(t *testing.T) {
			w := newSite(t)
			far := w.listen("192.0.2.2:80")
			w.serve("web", "192.0.2.1:8080")
			a := newAgentIn(t, w.host, settings{"capture": capture, "scopes": nil})
			sc := a.scope("host")
			if sc.Mode.String() != "watch" || !sc.Host || sc.Protected {
				t.Errorf("the default scope: %+v", sc)
			}
			held := launch(t, w.host, "shop", job{To: "192.0.2.2:80", Hold: true})
			if r := held.next(); r.Got != "app" || r.Peer != "192.0.2.2:80" {
				t.Error(r)
			}
			if got, err := w.ask("192.0.2.1:8080"); got != "app" {
				t.Errorf("a service of a watched host: %q, %v", got, err)
			}
			c := w.connect("192.0.2.1:8080")
			defer c.Close()
			a.shows("shop", "outbound", "192.0.2.2:80")
			a.shows("web", "inbound", "192.0.2.2")
			out := a.must("status")
			for _, want := range []string{"web", "192.0.2.1:8080", "shop", "192.0.2.2"} {
				if !strings.Contains(out, want) {
					t.Errorf("status says nothing of %s:\n%s", want, out)
				}
			}
			if r := held.goOn(); r.Step != "" {
				t.Error(r)
			}
			if len(far.clients()) != 1 || w.rules() != "" {
				t.Errorf("something was touched; rules: %s", w.rules())
			}
			if capture == "auto" && a.status().Capture != "ebpf" {
				t.Errorf("capture %s (%s)", a.status().Capture, a.status().CaptureReason)
			}
			if out, code := a.command("doctor", "--config", filepath.Join(a.Dir, "agent.yaml")); code != 0 {
				t.Errorf("doctor beside an agent that watches: exit code %d: %s", code, out)
			}
		})
	}
}

// shows waits until status shows who talks to whom.
func (a *agentProc) shows(workload, direction, peer string) {
	a.t.Helper()
	nettest.Wait(a.t, workload+" to be seen talking to "+peer, func() bool {
		return anyOf(a.status().Observations, func(o admin.Observation) bool {
			return strings.HasPrefix(o.Workload, workload) && o.Direction == direction && o.Peer == peer
		})
	})
}
