package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/capture"
	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

func addJSON(t testing.TB, a *Agent, c ScopeConfig) error {
	t.Helper()
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return a.AddScope(t.Context(), raw)
}

func isBadRequest(err error) bool {
	var bad admin.BadRequest
	return errors.As(err, &bad)
}

func TestAddAndRemoveScope(t *testing.T) {
	a, b := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "scope")
	ns.Exec(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "lo")
	before := fds(t)
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path, Mode: "enforce"}); err != nil {
		t.Fatal(err)
	}
	told, _ := b.scope("web")
	if len(told.Outbound) != 2 || len(told.Inbound) != 2 || told.Source4 != ip("192.0.2.1") || told.Mode != authz.Enforce {
		t.Errorf("the back end was told %+v", told)
	}
	if out := ns.Exec(t, "ss", "-Hltn"); !strings.Contains(out, ":15008") {
		t.Errorf("no listeners:\n%s", out)
	}
	if err := a.RemoveScope(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if out := ns.Exec(t, "ss", "-Hltn"); strings.Contains(out, ":150") {
		t.Errorf("listeners left:\n%s", out)
	}
	if _, there := b.scope("web"); there {
		t.Error("the back end still has the scope")
	}
	nettest.Wait(t, "all descriptors closed", func() bool { return fds(t) <= before })
	if err := a.RemoveScope(t.Context(), "web"); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

func TestRefusedScopes(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "refused")
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path}); err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string]string{
		"unknown key":         `{"name":"x","netns":"/run/netns/x","moed":"enforce"}`,
		"not an object":       `["x"]`,
		"two values":          `{"name":"x","host":true} {"name":"y","host":true}`,
		"no place":            `{"name":"x"}`,
		"name taken":          `{"name":"web","host":true}`,
		"namespace taken":     `{"name":"x","netns":"` + ns.Path + `"}`,
		"no such namespace":   `{"name":"x","netns":"/run/netns/surely-not-there"}`,
		"no such process":     `{"name":"x","pid":4194399}`,
		"unknown mode":        `{"name":"x","host":true,"mode":"observe"}`,
		"patterns in a netns": `{"name":"x","netns":"/run/netns/x","units":["a"]}`,
	} {
		if err := a.AddScope(t.Context(), json.RawMessage(raw)); !isBadRequest(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := a.AddScope(t.Context(), json.RawMessage(`{"name":"x","netns":"/etc/passwd"}`)); err == nil {
		t.Error("a file is no namespace")
	}
	if n := len(a.scopeList()); n != 1 {
		t.Errorf("%d scopes are live", n)
	}
}

// Whatever fails while a scope is added, nothing of it is left behind.
func TestFailedAddLeavesNothing(t *testing.T) {
	a, b := living(t, settingsIn(t, dir(t), ""))
	for _, how := range []string{"back end", "port"} {
		ns := nettest.NetNS(t, "failed")
		var taken net.Listener
		if how == "port" {
			taken = ns.Listen(t, "[::]:15008")
		} else {
			b.fail["add web enforce"] = errors.New("no room")
		}
		before := fds(t)
		err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path, Mode: "enforce"})
		if err == nil || len(a.scopeList()) != 0 {
			t.Fatalf("%s: %v, %d scopes", how, err, len(a.scopeList()))
		}
		if taken != nil {
			taken.Close()
			before--
		}
		if out := ns.Exec(t, "ss", "-Hltn"); strings.Contains(out, ":150") {
			t.Errorf("%s: listeners left:\n%s", how, out)
		}
		nettest.Wait(t, "all descriptors closed", func() bool { return fds(t) <= before })
		delete(b.fail, "add web enforce")
		if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path, Mode: "enforce"}); err != nil {
			t.Errorf("%s: the second time: %v", how, err)
		}
		if err := a.RemoveScope(t.Context(), "web"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSetMode(t *testing.T) {
	a, b := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "mode")
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path}); err != nil {
		t.Fatal(err)
	}
	for _, m := range []authz.Mode{authz.DryRun, authz.Enforce, authz.DryRun, authz.Watch, authz.Enforce, authz.Enforce, authz.Watch} {
		if err := a.SetMode(t.Context(), "web", m); err != nil {
			t.Fatalf("%s: %v", m, err)
		}
		told, _ := b.scope("web")
		if told.Mode != m || (len(told.Outbound) == 0) != (m == authz.Watch) {
			t.Errorf("%s: the back end was told %s with listeners %v", m, told.Mode, told.Outbound)
		}
		listening := strings.Contains(ns.Exec(t, "ss", "-Hltn"), ":15001")
		if listening != (m != authz.Watch) {
			t.Errorf("%s: listening is %v", m, listening)
		}
	}
	if err := a.SetMode(t.Context(), "nope", authz.Watch); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("unknown scope: %v", err)
	}
}

// A mode that cannot be had leaves the old one in force.
func TestSetModeFails(t *testing.T) {
	a, b := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "modefail")
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path}); err != nil {
		t.Fatal(err)
	}
	b.fail["add web enforce"] = errors.New("no room")
	if err := a.SetMode(t.Context(), "web", authz.Enforce); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("%v", err)
	}
	if told, there := b.scope("web"); !there || told.Mode != authz.Watch {
		t.Errorf("the scope is now %+v", told)
	}
	delete(b.fail, "add web enforce")
	if err := a.SetMode(t.Context(), "web", authz.Enforce); err != nil {
		t.Fatal(err)
	}
	b.fail["mode web dry-run"] = errors.New("not now")
	if err := a.SetMode(t.Context(), "web", authz.DryRun); err == nil {
		t.Error("a failure of the back end was lost")
	}
	b.fail["remove web"] = errors.New("stuck")
	if err := a.RemoveScope(t.Context(), "web"); err == nil {
		t.Error("a failure of the back end was lost")
	}
	// Its workloads are still led to the listeners, so these must be there.
	if st := a.Status(t.Context()); st.Scopes[0].Mode != authz.Enforce || !strings.Contains(ns.Exec(t, "ss", "-Hltn"), ":15001") {
		t.Errorf("%+v", st.Scopes[0])
	}
	delete(b.fail, "remove web")
}

// Changes and questions from many sides at once neither race nor lock up.
func TestScopesFromManySides(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "many")
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			for range 4 {
				_ = a.SetMode(context.Background(), "web", authz.Mode(i)) // one of them wins
				a.Status(context.Background())
			}
		})
	}
	wg.Go(func() {
		for range 4 {
			ns.Do(func() error { return nil })
			ns.Exec(t, "ip", "addr", "add", "192.0.2.7/24", "dev", "lo")
			ns.Exec(t, "ip", "addr", "del", "192.0.2.7/24", "dev", "lo")
		}
	})
	wg.Wait()
	if err := a.RemoveScope(t.Context(), "web"); err != nil {
		t.Error(err)
	}
}

// What a workload sees as its own address follows the namespace's.
func TestPrimaryAddressIsFollowed(t *testing.T) {
	a, b := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "primary")
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path, Mode: "dry-run"}); err != nil {
		t.Fatal(err)
	}
	ns.Exec(t, "ip", "addr", "add", "192.0.2.5/24", "dev", "lo")
	nettest.Wait(t, "the back end to know the address", func() bool {
		told, _ := b.scope("web")
		return told.Source4 == ip("192.0.2.5") && len(told.Outbound) == 2 && told.Mode == authz.DryRun
	})
}

func TestProtectionIsReadBack(t *testing.T) {
	a, b := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "protect")
	add := func(mode string) {
		t.Helper()
		if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path, Mode: mode}); err != nil {
			t.Fatal(err)
		}
	}
	state := func() admin.Scope { return a.Status(t.Context()).Scopes[0] }
	fresh := func() { a.scopes["web"].verified = verdict{} }

	add("watch")
	b.problems = []string{"of no interest in watch mode"}
	if s := state(); s.Protected || len(s.Problems) != 0 || b.verified != 0 {
		t.Errorf("watched: %+v", s)
	}
	b.problems = nil
	if err := a.SetMode(t.Context(), "web", authz.DryRun); err != nil || state().Protected {
		t.Errorf("dry-run is protected: %v", err)
	}
	if err := a.SetMode(t.Context(), "web", authz.Enforce); err != nil || !state().Protected {
		t.Errorf("enforce is not protected: %v, %+v", err, state())
	}
	b.problems = []string{"a hook is missing"}
	fresh()
	if s := state(); s.Protected || s.Problems[0] != "a hook is missing" {
		t.Errorf("%+v", s)
	}
	b.problems = nil
	ns.Exec(t, "ip", "link", "set", "lo", "down")
	nettest.Wait(t, "lo down to be told", func() bool { fresh(); s := state(); return !s.Protected && len(s.Problems) == 1 })
	// One look answers many: whoever asks often does not make the kernel work.
	fresh()
	before := b.verified
	for range 10 {
		state()
	}
	if n := b.verified - before; n > 2 {
		t.Errorf("%d looks for 10 questions within a second", n)
	}
}

// A connection that was open before is told with its program, and makes the
// scope less than protected until it ends.
func TestUncoveredConnections(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	ns, far := nettest.NetNS(t, "uncov"), nettest.NetNS(t, "uncovfar")
	nettest.VethPair(t, ns, far, "192.0.2.1/24", "192.0.2.2/24")
	accept(t, far.Listen(t, "192.0.2.2:8080"))
	accept(t, ns.Listen(t, "127.0.0.1:8081"))
	outside := dialIn(t, ns, "192.0.2.2:8080")
	dialIn(t, ns, "127.0.0.1:8081") // loopback is not captured, so nothing is amiss
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path, Mode: "enforce"}); err != nil {
		t.Fatal(err)
	}
	s := a.Status(t.Context()).Scopes[0]
	if s.Protected || len(s.Uncovered) != 1 || s.Uncovered[0].Remote != "192.0.2.2:8080" || s.Uncovered[0].PID == 0 || s.Uncovered[0].Process == "" {
		t.Fatalf("%+v", s)
	}
	outside.Close()
	nettest.Wait(t, "the scope to be protected", func() bool { return a.Status(context.Background()).Scopes[0].Protected })
}

func TestUncoveredLoopbackWhereItIsCaptured(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "uncovlo")
	accept(t, ns.Listen(t, "127.0.0.1:8081"))
	dialIn(t, ns, "127.0.0.1:8081")
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path, Mode: "enforce", Loopback: string(capture.LoopbackEnforce)}); err != nil {
		t.Fatal(err)
	}
	if s := a.Status(t.Context()).Scopes[0]; s.Protected || len(s.Uncovered) == 0 {
		t.Errorf("%+v", s)
	}
	// Where nothing is captured at all nothing is missing.
	if err := a.SetMode(t.Context(), "web", authz.Watch); err != nil {
		t.Fatal(err)
	}
	if s := a.Status(t.Context()).Scopes[0]; len(s.Uncovered) != 0 {
		t.Errorf("%+v", s)
	}
}

// accept takes connections until the listener closes, and holds them open for the test.
func accept(t testing.TB, ln net.Listener) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
}

func dialIn(t testing.TB, ns *nettest.NS, addr string) net.Conn {
	t.Helper()
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = net.Dial("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
