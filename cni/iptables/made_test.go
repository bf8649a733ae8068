package iptables_test

import (
	"net"
	"strings"
	"testing"

	"ringfence.dev/cni/iptables"
	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

// nftNamespace is a namespace without any rules, to be written by the nft programs.
func nftNamespace(t *testing.T) (*iptables.Tools, *nettest.NS, *netns.Handle) {
	t.Helper()
	nettest.RequireRoot(t)
	tools, err := find(t).Only(iptables.NFT)
	if err != nil {
		nettest.Missing(t, "no iptables-nft programs")
	}
	ns := nettest.NetNS(t, "rf-test-fw")
	h, err := netns.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return tools, ns, h
}

func tables(t *testing.T, ns *nettest.NS) (names []string) {
	t.Helper()
	for _, family := range []string{"iptables", "ip6tables"} {
		for line := range strings.Lines(ns.Exec(t, family+"-nft-save")) {
			if name, ok := strings.CutPrefix(strings.TrimSpace(line), "*"); ok {
				names = append(names, family+" "+name)
			}
		}
	}
	return names
}

// What another process made, and left, goes with the tables that came with it.
func TestTablesThatWereNotThereGo(t *testing.T) {
	tools, ns, h := nftNamespace(t)
	for _, again := range []func() (*iptables.Namespace, error){
		func() (*iptables.Namespace, error) { return tools.Open(t.Context(), h) },
		func() (*iptables.Namespace, error) { return tools.OpenAs(h, iptables.NFT), nil },
	} {
		n, err := tools.Open(t.Context(), h)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := n.Apply(t.Context(), both); err != nil {
				t.Fatal(err)
			}
		}
		if wrong := n.Verify(t.Context(), both); len(wrong) > 0 {
			t.Errorf("Verify = %q", wrong)
		}
		if got := tables(t, ns); len(got) != 4 {
			t.Fatalf("tables %q: the test proves nothing", got)
		}
		if n, err = again(); err != nil {
			t.Fatal(err)
		}
		if err := n.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := tables(t, ns); len(got) != 0 {
			t.Errorf("left: %q", got)
		}
	}
	if n := tracked(t, ns); n != "0" {
		t.Errorf("%s connections are tracked: the hooks are still there", n)
	}
}

// tracked counts tracked connections after one over loopback, which is still open.
func tracked(t *testing.T, ns *nettest.NS) string {
	t.Helper()
	l := ns.Listen(t, "127.0.0.1:0")
	if err := ns.Do(func() error {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err == nil {
			t.Cleanup(func() { conn.Close() })
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(ns.Exec(t, "sysctl", "-n", "net.netfilter.nf_conntrack_count"))
}

// A table that was there, or that somebody uses by now, stays as it is.
func TestTablesOfOthersStay(t *testing.T) {
	for name, c := range map[string]struct {
		before, after []string
		want          string
	}{
		"there before":   {before: []string{"iptables-nft", "-t", "nat", "-N", "THEIRS"}, want: ":THEIRS"},
		"empty before":   {before: []string{"iptables-nft", "-t", "nat", "-P", "OUTPUT", "ACCEPT"}, want: "*nat"},
		"a rule since":   {after: []string{"iptables-nft", "-t", "nat", "-A", "OUTPUT", "-d", "198.51.100.7", "-j", "ACCEPT"}, want: "-A OUTPUT -d 198.51.100.7/32 -j ACCEPT"},
		"a chain since":  {after: []string{"iptables-nft", "-t", "nat", "-N", "THEIRS"}, want: ":THEIRS"},
		"a policy since": {after: []string{"iptables-nft", "-t", "filter", "-P", "FORWARD", "DROP"}, want: ":FORWARD DROP"},
	} {
		t.Run(name, func(t *testing.T) {
			tools, ns, h := nftNamespace(t)
			if c.before != nil {
				ns.Exec(t, c.before[0], c.before[1:]...)
			}
			n, err := tools.Open(t.Context(), h)
			if err != nil {
				t.Fatal(err)
			}
			if err := n.Apply(t.Context(), both); err != nil {
				t.Fatal(err)
			}
			if c.after != nil {
				ns.Exec(t, c.after[0], c.after[1:]...)
			}
			if err := n.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			if text := ns.Exec(t, "iptables-nft-save"); !strings.Contains(text, c.want) || strings.Contains(text, iptables.Prefix) {
				t.Errorf("%q is not in\n%s", c.want, text)
			}
		})
	}
}

// Where only one table is needed no more, only that one goes.
func TestTableNoLongerNeededGoes(t *testing.T) {
	tools, ns, h := nftNamespace(t)
	n, err := tools.Open(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Apply(t.Context(), both); err != nil {
		t.Fatal(err)
	}
	less := map[iptables.Family]iptables.Ruleset{iptables.IPv4: both[iptables.IPv4][1:], iptables.IPv6: both[iptables.IPv6][1:]}
	if err := n.Apply(t.Context(), less); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(tables(t, ns), ","); got != "iptables filter,ip6tables filter" {
		t.Errorf("tables %q", got)
	}
	// Whose mark holds a rule is no mark: nothing of ours has one.
	ns.Exec(t, "iptables-nft", "-A", "RINGFENCE_MADE", "-j", "ACCEPT")
	if wrong := n.Verify(t.Context(), less); len(wrong) != 1 || !strings.Contains(wrong[0], "RINGFENCE_MADE") {
		t.Errorf("Verify = %q", wrong)
	}
}
