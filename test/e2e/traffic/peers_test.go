package traffic_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/agent/admin"
	"ringfence.dev/ca"
	"ringfence.dev/test/e2e/world"
	"ringfence.dev/test/nettest"
	"ringfence.dev/tools/ringfence/lab"
)

const meshOnly = `@id("only-in-the-mesh") @reason("nothing leaves this host in plaintext, except to the printer")
permit (principal, action == Action::"connect", resource) when { context.mesh };

@id("printer")
permit (principal == Workload::"spiffe://lab.test/ns/a/sa/shop", action == Action::"connect", resource == Service::"192.0.2.2:631");
`

// A peer that has no agent gets plaintext if policy says so, and nothing else.
func TestPeerWithoutAgent(t *testing.T) {
	o := lab.Options{Agents: []string{"a"}, Policies: world.Policies(t, meshOnly)}
	world.ForEach(t, o, func(t *testing.T, w *world.World) {
		shop, intruder, server := w.Puppet("a", "shop"), w.Puppet("a", "intruder"), w.Puppet("b", "server")
		server.Echo("192.0.2.2:631")
		server.Echo("[::]:7000")
		wire, err := w.Record("a")
		if err != nil {
			t.Fatal(err)
		}
		c := shop.MustDial("192.0.2.2:631")
		c.Send("in plaintext")
		c.Want("in plaintext")
		_ = c.Close()
		if err := wire.Close(); err != nil {
			t.Fatal(err)
		}
		if !wire.Saw("in plaintext") || wire.TLSRecords() != 0 {
			t.Error("the permitted connection was not plaintext")
		}
		for _, r := range []struct {
			who  *world.Puppet
			addr string
		}{{intruder, "192.0.2.2:631"}, {shop, "192.0.2.2:7000"}, {shop, "[2001:db8::2]:7000"}} {
			refusedDial(t, r.who, r.addr)
		}
		last := w.Ringfence("a", "explain", "--unit", "shop").Out
		for _, want := range []string{"DENY", "only-in-the-mesh", "context.mesh"} {
			if !strings.Contains(last, want) {
				t.Errorf("explain does not say %q:\n%s", want, last)
			}
		}
		if s := w.Status("a"); !slices.ContainsFunc(s.Peers, func(p admin.Peer) bool { return p.Addr == "192.0.2.2" && p.Agent == "no" }) {
			t.Errorf("peers: %+v", s.Peers)
		} else if n := s.Counters["probes"]; n != 2 { // once for each address
			t.Errorf("%d probes", n)
		}
		checkFails(t, w, "192.0.2.2", "reachability", "start one there")
	})
}

// refusedDial fails unless nothing can be exchanged with an address, without delay.
func refusedDial(t *testing.T, p *world.Puppet, addr string) {
	t.Helper()
	start := time.Now()
	c, err := p.In(t).Dial(addr)
	if err == nil {
		// A reset is told once: to the write if it is there already, else to the read.
		if _, err = c.Write([]byte("x")); err == nil {
			var got string
			if got, err = c.Rest(); got != "" {
				t.Errorf("%s answered %q", addr, got)
			}
		}
		_ = c.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("%s: %v, want a refusal or a reset", addr, err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("%s: refused after %v", addr, d)
	}
}

// checkFails fails unless `ringfence check` stops at a step and says a fix.
func checkFails(t *testing.T, w *world.World, peer, step, fix string) {
	t.Helper()
	var r admin.CheckReport
	w.JSON("a", &r, "check", "--peer", peer)
	last := r.Steps[len(r.Steps)-1]
	if r.OK || last.OK || last.Name != step || !strings.Contains(last.Fix, fix) {
		t.Errorf("check of %s: %+v", peer, r)
	}
	if got := w.Ringfence("a", "check", "--peer", peer); got.Code != 1 || !strings.Contains(got.Out, "FAIL  "+step) || !strings.Contains(got.Out, fix) {
		t.Errorf("check of %s: %+v", peer, got)
	}
}

// Silence on the tunnel's port is no proof that there is no agent: an enforcing
// scope refuses, and does not wait long for it.
func TestSilentPeer(t *testing.T) {
	iptables := world.Program(t, "iptables")
	world.ForEach(t, lab.Options{Agents: []string{"a"}}, func(t *testing.T, w *world.World) {
		w.Puppet("b", "server").Echo("192.0.2.2:7000")
		if r := w.Run("b", "firewall", iptables, "-w", "-A", "INPUT", "-p", "tcp", "--dport", "15008", "-j", "DROP"); r.Code != 0 {
			t.Fatalf("iptables: %+v", r)
		}
		shop := w.Puppet("a", "shop")
		for range 3 {
			refusedDial(t, shop, "192.0.2.2:7000")
		}
		if n := w.Status("a").Counters["probes"]; n != 1 {
			t.Errorf("%d probes for three connections", n)
		}
		checkFails(t, w, "192.0.2.2", "reachability", "firewall")
	})
}

// Nobody at that address: the client learns it as without an agent, from the
// network's own error, and soon.
func TestUnreachable(t *testing.T) {
	world.ForEach(t, lab.Options{}, func(t *testing.T, w *world.World) {
		shop := w.Puppet("a", "shop")
		for _, addr := range []string{"192.0.2.77:80", "[2001:db8::77]:80", "198.51.100.1:80"} { // no such host twice, no route once
			c, err := shop.Dial(addr)
			if err == nil {
				var got string
				if got, err = c.Rest(); got != "" {
					t.Errorf("%s answered %q", addr, got)
				}
				_ = c.Close()
			}
			if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %v", addr, err)
			}
		}
	})
}

// What was once an agent's address stays one.
func TestPeerChanges(t *testing.T) {
	world.ForEach(t, lab.Options{}, func(t *testing.T, w *world.World) {
		shop, server := w.Puppet("a", "shop"), w.Puppet("b", "server")
		server.Echo("[::]:7000")
		works := func(what string) {
			t.Helper()
			c, err := shop.Dial("192.0.2.2:7000")
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			defer c.Close()
			c.Send("hello")
			if got := readUntil(t, c, "hello"); got != "hello" {
				t.Fatalf("%s: %q", what, got)
			}
		}
		restart := func(host string, change func(map[string]any)) {
			t.Helper()
			w.Configure(host, change)
			if err := w.Restart(t.Context(), host); err != nil {
				t.Fatal(err)
			}
		}
		works("at first")
		var good admin.CheckReport
		w.JSON("a", &good, "check", "--peer", "192.0.2.2")
		if last := good.Steps[len(good.Steps)-1]; !good.OK || last.Name != "tunnel" {
			t.Errorf("check: %+v", good)
		}

		restart("b", func(s map[string]any) { s["host"] = "impostor" })
		refusedDial(t, shop, "192.0.2.2:7000")
		if r := w.Ringfence("a", "peer", "clear", "192.0.2.2"); r.Code != 0 {
			t.Fatalf("peer clear: %+v", r)
		}
		works("after the operator has said that it may")

		restart("a", func(s map[string]any) { s["pins"] = map[string]string{"192.0.2.2": "spiffe://lab.test/ns/b"} })
		refusedDial(t, shop, "192.0.2.2:7000") // pinned is b, not impostor
		restart("b", func(s map[string]any) { s["host"] = "b" })
		works("with the identity that is pinned")
		restart("a", func(s map[string]any) { delete(s, "pins") })
		works("without a pin")

		foreign(t, w, "b")
		restart("b", func(s map[string]any) { s["trust_domain"] = "foreign.test" })
		refusedDial(t, shop, "192.0.2.2:7000")
		checkFails(t, w, "192.0.2.2", "trust bundle and svid", "ringfence ca bundle")

		// Its agent gone for good, the peer gets no plaintext, though policy would permit it.
		b, _ := w.Agent("b")
		if err := errors.Join(b.Stop(t.Context()), b.Cleanup(t.Context())); err != nil {
			t.Fatal(err)
		}
		refusedDial(t, shop, "192.0.2.2:7000")
		w.Ringfence("a", "peer", "clear", "192.0.2.2")
		nettest.Wait(t, "plaintext after the operator has cleared the peer", func() bool {
			c, err := shop.Dial("192.0.2.2:7000")
			if err != nil {
				return false
			}
			defer c.Close()
			_, err = c.Write([]byte("hello"))
			n, _ := c.Read(make([]byte, 5))
			return err == nil && n > 0
		})
	})
}

// foreign gives a host's agent a CA that nobody else knows.
func foreign(t *testing.T, w *world.World, host string) {
	t.Helper()
	dir := filepath.Join(w.Dir(), host, "state", "ca")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Init(dir, spiffeid.RequireTrustDomainFromString("foreign.test"), ca.Options{}); err != nil {
		t.Fatal(err)
	}
}
