package ebpf_test

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/capture/ebpf"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

// An agent dies, the scope stays closed, the next agent goes on: on the same tables, or on others.
func TestNextAgentTakesOver(t *testing.T) {
	for name, sizes := range map[string]map[string]uint32{"same layout": nil, "other layout": {"rf_notes": 256}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, authz.Enforce, nil)
			listen(t, w.host, appDir, "0.0.0.0:8080")
			w.serve("192.0.2.2:80")
			dial := job{To: "192.0.2.2:80"}
			w.run(dial).want(t, "agent")
			w.stopRun()
			if err := w.b().Close(false); err != nil {
				t.Fatal(err)
			}
			w.silence()
			w.run(dial).wantError(t, "connect", unix.ECONNREFUSED)
			if _, _, err := w.call("192.0.2.1:8080"); err == nil {
				t.Error("inbound went past a dead agent")
			}
			if sizes != nil {
				w.conf.Sizes = sizes
			}
			w.listen()
			w.open()
			nettest.Wait(t, "the new agent to be in place", func() bool { return len(w.b().Verify("s")) == 0 })
			w.run(dial).want(t, "agent")
			if got, _, err := w.call("192.0.2.1:8080"); got != "agent+app" {
				t.Errorf("inbound %q, %v", got, err)
			}
		})
	}
}

// A scope that the next agent is not configured for stays as it was until Prune.
func TestPrune(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	w.stopRun()
	if err := w.b().Close(false); err != nil {
		t.Fatal(err)
	}
	w.silence()
	b, err := ebpf.New(w.conf)
	if err != nil {
		t.Fatal(err)
	}
	w.now.Store(b)
	w.run(job{To: "192.0.2.2:80"}).wantError(t, "connect", unix.ECONNREFUSED)
	if err := b.Prune(); err != nil {
		t.Fatal(err)
	}
	w.serve("192.0.2.2:80")
	w.run(job{To: "192.0.2.2:80"}).want(t, "app")
	for _, table := range b.Tables() {
		if table.Entries != 0 {
			t.Errorf("%s holds %d entries", table.Name, table.Entries)
		}
	}
}

// An Add that fails leaves nothing, and what was live under another agent is not opened by it.
func TestFailedAdd(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	ctx := context.Background()
	again := w.scope
	again.Name = "other"
	if w.b().Add(ctx, w.scope) == nil || w.b().Add(ctx, again) == nil {
		t.Error("a live name or namespace was added again")
	}
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
	if err := w.b().Remove(ctx, "s"); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*capture.Scope){
		"unknown mode":     func(s *capture.Scope) { s.Mode = 9 },
		"unknown loopback": func(s *capture.Scope) { s.Loopback = "maybe" },
		"unknown down":     func(s *capture.Scope) { s.OnAgentDown = "maybe" },
		"bad listener":     func(s *capture.Scope) { s.Inbound = []int{-1} },
		"no namespace":     func(s *capture.Scope) { s.NS = nil },
	} {
		def := w.scope
		change(&def)
		if err := w.b().Add(ctx, def); err == nil {
			t.Errorf("%s: added", name)
		}
	}
	for _, table := range w.b().Tables() {
		if table.Entries != 0 {
			t.Errorf("%s holds %d entries", table.Name, table.Entries)
		}
	}
	left, _ := filepath.Glob(filepath.Join(pinRoot, w.conf.Instance, "steer", "*"))
	if len(left) != 0 {
		t.Errorf("steering links left: %v", left)
	}
	if err := w.b().Add(ctx, w.scope); err != nil {
		t.Errorf("the good definition: %v", err)
	}
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
}

// Two agents on one kernel do not disturb each other, in two namespaces.
func TestTwoInstances(t *testing.T) {
	a := newWorld(t, authz.Enforce, nil)
	b := newWorld(t, authz.Enforce, nil)
	for _, w := range []*world{a, b} {
		w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
		w.flow()
	}
	a.silence()
	a.run(job{To: "192.0.2.2:80"}).wantError(t, "connect", unix.ECONNREFUSED)
	b.run(job{To: "192.0.2.2:80"}).want(t, "agent")
}

func TestConfigIsChecked(t *testing.T) {
	nettest.RequireRoot(t)
	good := ebpf.Config{Instance: "c", PinRoot: pinRoot, CgroupRoot: treeRoot, AgentCgroup: agentDir}
	for name, change := range map[string]func(*ebpf.Config){
		"no agent cgroup":   func(c *ebpf.Config) { c.AgentCgroup = "" },
		"root as agent":     func(c *ebpf.Config) { c.AgentCgroup = treeRoot },
		"missing cgroup":    func(c *ebpf.Config) { c.AgentCgroup = "nothing" },
		"zero id":           func(c *ebpf.Config) { c.AgentCgroup = "0" },
		"file":              func(c *ebpf.Config) { c.AgentCgroup = agentDir + "/cgroup.procs" },
		"bad instance":      func(c *ebpf.Config) { c.Instance = "../x" },
		"short heartbeat":   func(c *ebpf.Config) { c.HeartbeatLimit = time.Millisecond },
		"unknown table":     func(c *ebpf.Config) { c.Sizes = map[string]uint32{"x": 1} },
		"cgroup root wrong": func(c *ebpf.Config) { c.CgroupRoot = "/proc" },
	} {
		c := good
		change(&c)
		if b, err := ebpf.New(c); err == nil {
			b.Close(true)
			t.Errorf("%s: accepted", name)
		}
	}
	if left, _ := filepath.Glob(pinRoot + "/*"); len(left) != 0 {
		t.Errorf("refused settings left %v", left)
	}
	for _, name := range []string{"", ".", "..", "../x", "a/../.."} {
		if _, err := ebpf.JoinLeaf(treeRoot, name); err == nil {
			t.Errorf("JoinLeaf(%q) succeeded", name)
		}
	}
}

// Names that the back end does not have are errors, not silence.
func TestUnknownScope(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	a := flowAddr("192.0.2.1:1")
	_, err := w.b().Origin("x", flow.Outbound, -1, a, a)
	for what, err := range map[string]error{
		"Origin":        err,
		"SetMode":       w.b().SetMode(t.Context(), capture.Scope{Name: "x"}),
		"SetCgroups":    w.b().SetCgroups("x", nil),
		"BeforeConnect": w.b().BeforeConnect("x", -1, a, a, flow.Flow{}),
	} {
		if !errors.Is(err, capture.ErrNoScope) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := w.b().Remove(t.Context(), "x"); err != nil {
		t.Errorf("Remove: %v", err)
	}
	w.b().Refused("x", flow.Flow{}, workloadNobody)
	if bad := w.b().Verify("x"); len(bad) == 0 {
		t.Error("Verify finds an unknown scope in order")
	}
	if _, err := w.b().Origin("s", flow.Outbound, -1, a, a); !errors.Is(err, capture.ErrNoOrigin) {
		t.Errorf("Origin without a note: %v", err)
	}
}

// A dial that leaves the host is bound as the caller's socket was.
func TestDialIsBoundLikeTheCaller(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	dev := deviceOf(t, w, "192.0.2.1")
	for to, source := range map[string]string{"192.0.2.2:80": "192.0.2.1", "[2001:db8::2]:80": "2001:db8::1"} {
		family := unix.AF_INET
		if to[0] == '[' {
			family = unix.AF_INET6
		}
		fd, err := w.scope.NS.Socket(family, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		f := flow.Flow{Direction: flow.Outbound, Device: dev.index, BoundSource: netip.MustParseAddr(source)}
		if err := w.b().BeforeConnect("s", fd, flowAddr(to), flowZero, f); err != nil {
			t.Fatal(err)
		}
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX); err != nil || got != int(dev.index) {
			t.Errorf("%s: bound to device %d (%v), want %d", to, got, err, dev.index)
		}
		if sa, err := unix.Getsockname(fd); err != nil || flowAddr(text(sa)).Addr() != f.BoundSource {
			t.Errorf("%s: bound to %s (%v), want %s", to, text(sa), err, source)
		}
	}
}
