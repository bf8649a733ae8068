package iptables

import (
	"strings"
	"testing"

	"ringfence.dev/agent/capture"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
)

func TestCaptureBothWays(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.add(authz.Enforce)
		for _, f := range families {
			t.Run(f.name, func(t *testing.T) { h.t = t; testBothWays(t, h, f) })
		}
		h.t = t
		if wrong := h.b.Verify("test"); len(wrong) > 0 {
			t.Errorf("Verify = %q", wrong)
		}
	})
}

func testBothWays(t *testing.T, h *host, f family) {
	serveBanner(t, h.peer, f.at(f.it, 8080), "peer")
	to := f.at(f.it, 8080)
	got, pid := runAs(t, h.ns, cg.work, "dial", to)
	if got != "outbound "+to {
		t.Fatalf("outbound: %q", got)
	}
	flow1 := h.last()
	if c := flow1.Caller; int(c.PID) != pid || c.UID != 0 || c.CgroupID == 0 || c.StartTime == 0 {
		t.Errorf("caller of pid %d = %+v", pid, c)
	}
	// The agent itself is not captured, whatever it dials.
	if got := h.dialAsAgent(to); got != "peer" {
		t.Errorf("the agent's own dial: %q", got)
	}
	h.want(cg.work, "outbound "+to, to, "mptcp=1")

	serveWorkload(t, h.ns, cg.work, f.at(f.us, 9090))
	serveWorkload(t, h.ns, cg.work, f.at("", 9091))
	h.wantPeer("inbound "+f.at(f.us, 9090), f.at(f.us, 9090))
	h.wantPeer("inbound "+f.at(f.us, 9091), f.at(f.us, 9091))
	h.wantPeer("refused", f.at(f.us, 9099))
	h.wantPeer("tunnel", f.at(f.us, capture.TunnelPort))
	h.wantPeer("refused", f.at(f.us, capture.OutboundPort))
	h.wantPeer("refused", f.at(f.us, capture.InboundPort))

	// Loopback is only observed here; and a straight dial to a listener gets nothing.
	h.want(cg.work, "workload "+f.at(f.us, 9090), f.at(f.us, 9090))
	h.want(cg.work, "no origin", f.at(f.loop, capture.OutboundPort))
	h.want(cg.work, "no origin", f.at(f.loop, capture.InboundPort))
}

// dialAsAgent dials from this process, whose sockets are of the agent's cgroup.
func (h *host) dialAsAgent(addr string) (got string) {
	_ = h.ns.Do(func() error {
		got = dial(addr)
		return nil
	})
	return got
}

func TestWatchInstallsNothing(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
		h.add(authz.Watch)
		if text := h.saved(v); strings.Contains(text, "RINGFENCE") {
			t.Errorf("rules in watch mode:\n%s", text)
		}
		h.want(cg.work, "peer", "192.0.2.2:8080")
		h.setMode(authz.DryRun)
		h.want(cg.work, "outbound 192.0.2.2:8080", "192.0.2.2:8080")
		h.setMode(authz.Watch)
		h.want(cg.work, "peer", "192.0.2.2:8080")
		if text := h.saved(v); strings.Contains(text, "RINGFENCE") {
			t.Errorf("rules back in watch mode:\n%s", text)
		}
		if wrong := h.b.Verify("test"); len(wrong) == 0 {
			t.Error("a watched scope is reported as covered")
		}
	})
}

func (h *host) saved(v fw.Variant) string {
	return h.ns.Exec(h.t, "iptables-"+string(v)+"-save") + h.ns.Exec(h.t, "ip6tables-"+string(v)+"-save")
}

func TestNothingIsLeft(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.scope.Loopback = capture.LoopbackEnforce
		h.ns.Exec(t, "iptables-"+string(v), "-t", "nat", "-A", "OUTPUT", "-d", "198.51.100.7", "-j", "ACCEPT")
		before := foreignRules(h.saved(v))
		h.add(authz.Enforce)
		if err := h.b.Remove(t.Context(), "test"); err != nil {
			t.Fatal(err)
		}
		if err := h.b.Remove(t.Context(), "test"); err != nil {
			t.Errorf("second Remove: %v", err)
		}
		if after := h.saved(v); strings.Contains(after, "RINGFENCE") || foreignRules(after) != before {
			t.Errorf("before %q, after %q", before, after)
		}
		// What an agent that died left behind is replaced.
		h.add(authz.Enforce)
		if err := h.b.Close(false); err != nil {
			t.Fatal(err)
		}
		var err error
		if h.b, err = New(t.Context(), Config{Variant: v}); err != nil {
			t.Fatal(err)
		}
		h.add(authz.DryRun)
		if text := h.saved(v); strings.Count(text, "-j RINGFENCE_OUT") != 2 || strings.Contains(text, "RINGFENCE_EGR") {
			t.Errorf("after taking over:\n%s", text)
		}
		if err := h.b.Close(true); err != nil {
			t.Fatal(err)
		}
		if text := h.saved(v); strings.Contains(text, "RINGFENCE") {
			t.Errorf("after Close:\n%s", text)
		}
		if _, err := h.b.Origin("test", flow.Outbound, 0, famAddr, famAddr); err == nil {
			t.Error("Origin works after Close")
		}
	})
}

// An agent that stops and leaves its enforcing scopes closed must not close the
// others with them.
func TestCloseWithoutDetachLetsOpenScopesPass(t *testing.T) {
	for _, c := range []struct {
		mode authz.Mode
		down capture.OnAgentDown
		want string
	}{
		{authz.Enforce, capture.DownClosed, "refused"},
		{authz.Enforce, capture.DownOpen, "peer"},
		{authz.DryRun, capture.DownClosed, "peer"},
	} {
		h := newHost(t, "", nil)
		h.scope.OnAgentDown = c.down
		serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
		h.add(c.mode)
		if err := h.b.Close(false); err != nil {
			t.Fatal(err)
		}
		h.die()
		h.want(cg.work, c.want, "192.0.2.2:8080")
	}
}

func foreignRules(text string) (rules string) {
	for l := range strings.Lines(text) {
		if strings.HasPrefix(l, "-A") {
			rules += l
		}
	}
	return rules
}
