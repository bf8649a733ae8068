package iptables_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"ringfence.dev/cni/iptables"
	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

func TestMain(m *testing.M) {
	// One thread that opens sockets lives as long as the process.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("ringfence.dev/cni/netns.(*openerThread).start.func1"))
}

var both = map[iptables.Family]iptables.Ruleset{
	iptables.IPv4: rules("icmp-port-unreachable"), iptables.IPv6: rules("icmp6-port-unreachable"),
}

func rules(unreachable string) iptables.Ruleset {
	return iptables.Ruleset{
		{Table: "nat", Name: "RINGFENCE_OUT", Hook: "OUTPUT", Match: iptables.R("-p tcp"), Rules: []iptables.Rule{
			iptables.R("-m owner ! --uid-owner 0-4294967294 -j RETURN"),
			iptables.R("-p tcp -j REDIRECT --to-ports 15001"),
		}},
		{Table: "filter", Name: "RINGFENCE_EGR", Hook: "OUTPUT", Rules: []iptables.Rule{
			iptables.R("-p 136 -j REJECT --reject-with " + unreachable),
		}},
	}
}

// forEachVariant runs a test with each variant's programs that are installed.
func forEachVariant(t *testing.T, f func(t *testing.T, v iptables.Variant, tools *iptables.Tools, ns *nettest.NS, h *netns.Handle)) {
	nettest.RequireRoot(t)
	tools := find(t)
	for _, v := range tools.Variants() {
		t.Run(string(v), func(t *testing.T) {
			ns := nettest.NetNS(t, "rf-test-fw")
			h, err := netns.Open(ns.Path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { h.Close() })
			// A rule of somebody else decides which variant is in use.
			ns.Exec(t, "iptables-"+string(v), "-A", "INPUT", "-s", "198.51.100.7", "-j", "DROP")
			f(t, v, tools, ns, h)
		})
	}
}

func find(t *testing.T) *iptables.Tools {
	t.Helper()
	tools, err := iptables.Find(t.Context())
	if errors.Is(err, iptables.ErrNotFound) && os.Getenv(nettest.RootTestsEnv) != "1" {
		nettest.Missing(t, "iptables is not installed")
	}
	if err != nil {
		t.Fatal(err)
	}
	return tools
}

func saved(t *testing.T, ns *nettest.NS) string {
	var all string
	for _, v := range find(t).Variants() {
		for _, p := range []string{"iptables-", "ip6tables-"} {
			all += ns.Exec(t, p+string(v)+"-save")
		}
	}
	return all
}

func TestApplyVerifyRemove(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v iptables.Variant, tools *iptables.Tools, ns *nettest.NS, h *netns.Handle) {
		n, err := tools.Open(t.Context(), h)
		if err != nil {
			t.Fatal(err)
		}
		if got, mixed := n.Variant(); got != v || mixed {
			t.Fatalf("variant %s (mixed %v) found in use, want %s", got, mixed, v)
		}
		for range 2 {
			if err := n.Apply(t.Context(), both); err != nil {
				t.Fatal(err)
			}
		}
		if n := strings.Count(saved(t, ns), "-j RINGFENCE_OUT"); n != 2 {
			t.Errorf("%d jumps after two calls, want one for each family", n)
		}
		if wrong := n.Verify(t.Context(), both); len(wrong) > 0 {
			t.Errorf("differences right after writing: %q", wrong)
		}
		if err := n.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		left := saved(t, ns)
		if strings.Contains(left, "RINGFENCE") || !strings.Contains(left, "198.51.100.7") {
			t.Errorf("left after Remove:\n%s", left)
		}
		if err := n.Remove(t.Context()); err != nil {
			t.Errorf("second Remove: %v", err)
		}
	})
}

func TestVerifyNoticesEveryChange(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v iptables.Variant, tools *iptables.Tools, ns *nettest.NS, h *netns.Handle) {
		n, err := tools.Open(t.Context(), h)
		if err != nil {
			t.Fatal(err)
		}
		for name, change := range map[string][]string{
			"flushed":  {"-t", "nat", "-F", "RINGFENCE_OUT"},
			"added":    {"-t", "nat", "-I", "RINGFENCE_OUT", "-j", "ACCEPT"},
			"jump":     {"-t", "nat", "-D", "OUTPUT", "-p", "tcp", "-j", "RINGFENCE_OUT"},
			"before":   {"-t", "nat", "-I", "OUTPUT", "-p", "tcp", "--dport", "80", "-j", "ACCEPT"},
			"doubled":  {"-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "RINGFENCE_OUT"},
			"replaced": {"-t", "nat", "-R", "RINGFENCE_OUT", "2", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "15002"},
			"leftover": {"-t", "mangle", "-N", "RINGFENCE_OLD"},
		} {
			if err := n.Apply(t.Context(), both); err != nil {
				t.Fatal(err)
			}
			ns.Exec(t, "iptables-"+string(v), change...)
			if wrong := n.Verify(t.Context(), both); len(wrong) == 0 {
				t.Errorf("%s: not noticed", name)
			}
			if err := n.Apply(t.Context(), both); err != nil {
				t.Errorf("%s: not repaired: %v", name, err)
			}
			if wrong := n.Verify(t.Context(), both); len(wrong) > 0 {
				t.Errorf("%s: after repair: %q", name, wrong)
			}
		}
	})
}

// The variant in use may change between two agents: what the former one left
// in the other variant would redirect a second time.
func TestLeftoversOfOtherVariantGo(t *testing.T) {
	nettest.RequireRoot(t)
	tools := find(t)
	if len(tools.Variants()) < 2 {
		nettest.Missing(t, "only one variant of iptables is installed")
	}
	ns := nettest.NetNS(t, "rf-test-fw")
	h, err := netns.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	old := tools.OpenAs(h, iptables.Legacy)
	if err := old.Apply(t.Context(), both); err != nil {
		t.Fatal(err)
	}
	ns.Exec(t, "iptables-nft", "-A", "INPUT", "-s", "198.51.100.7", "-j", "DROP")
	n, err := tools.Open(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	if v, mixed := n.Variant(); v != iptables.NFT || mixed {
		t.Fatalf("variant = %s (mixed %v): our own rules were counted", v, mixed)
	}
	if wrong := n.Verify(t.Context(), both); len(wrong) == 0 {
		t.Error("the other variant's leftovers are not noticed")
	}
	if err := n.Apply(t.Context(), both); err != nil {
		t.Fatal(err)
	}
	if text := ns.Exec(t, "iptables-legacy-save"); strings.Contains(text, "RINGFENCE") {
		t.Errorf("left in legacy:\n%s", text)
	}
}

func TestApplyFailsWhole(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v iptables.Variant, tools *iptables.Tools, ns *nettest.NS, h *netns.Handle) {
		n, err := tools.Open(t.Context(), h)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Apply(t.Context(), both); err != nil {
			t.Fatal(err)
		}
		bad := map[iptables.Family]iptables.Ruleset{iptables.IPv4: {{Table: "nat", Name: "RINGFENCE_OUT", Rules: []iptables.Rule{
			iptables.R("-j RETURN"), iptables.R("-m cgroup --path /no/such/cgroup/here -j RETURN"),
		}}}}
		if err := n.Apply(t.Context(), bad); err == nil {
			t.Fatal("a rule that the kernel refuses is reported as written")
		}
		if text := ns.Exec(t, "iptables-"+string(v)+"-save", "-t", "nat"); !strings.Contains(text, "--to-ports 15001") {
			t.Errorf("the former rules are gone:\n%s", text)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := n.Apply(ctx, both); !errors.Is(err, context.Canceled) {
			t.Errorf("Apply after cancel: %v", err)
		}
	})
}
