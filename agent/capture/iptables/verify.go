package iptables

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/policy/authz"
)

// verifyLimit bounds one look at a scope, the wait for the xtables lock included.
const verifyLimit = 20 * time.Second

// Verify reads the rules back and names each way in which the scope is not
// covered. A watched scope is never covered, and says so.
func (b *Backend) Verify(name string) []string {
	sc, err := b.scope(name)
	if err != nil {
		return []string{err.Error()}
	}
	ctx, cancel := context.WithTimeout(context.Background(), verifyLimit)
	defer cancel()
	sc.mu.Lock()
	defer sc.mu.Unlock()
	return sc.verifyLocked(ctx)
}

func (sc *scope) verifyLocked(ctx context.Context) (wrong []string) {
	if sc.closed || sc.fw == nil {
		return []string{capture.ErrNoScope.Error()}
	}
	if sc.failed != nil {
		wrong = append(wrong, "rules could not be written: "+sc.failed.Error())
	}
	wrong = append(wrong, sc.fw.Verify(ctx, sc.want)...)
	if sc.s.Mode == authz.Watch {
		return append(wrong, "watch mode: nothing is redirected or refused")
	}
	if id, err := sc.b.tree.ID(sc.b.leaf); err != nil || id != sc.b.leafID {
		wrong = append(wrong, fmt.Sprintf("the agent's cgroup %s was removed or made again: the loop guard holds the old one", sc.b.leaf))
	}
	wrong = append(wrong, sc.verifyIPv6Locked()...)
	wrong = append(wrong, sc.verifyRouting()...)
	return append(wrong, sc.verifyConntrack()...)
}

// verifyIPv6Locked tells of a family that is open but not redirected. Only ::1 does
// not count: loopback has its own setting.
func (sc *scope) verifyIPv6Locked() []string {
	if !sc.ipv6 || !usesIPv6(sc.s) {
		return nil
	}
	if !sc.fw.Family(fw.IPv6) {
		return []string{"IPv6 is open but cannot be captured: no ip6tables program of the variant in use"}
	}
	if !listens(sc.s.Outbound, unix.AF_INET6) || !listens(sc.s.Inbound, unix.AF_INET6) {
		return []string{"IPv6 is open but the agent has no IPv6 listeners in the namespace"}
	}
	return nil
}

// verifyRouting looks for a local table that is not asked first: data of a
// connection to the agent could then be routed out of the machine.
func (sc *scope) verifyRouting() (wrong []string) {
	err := sc.s.NS.Do(func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			rules, err := netlink.RuleList(family)
			if err != nil || len(rules) == 0 {
				if family == unix.AF_INET6 {
					continue // no IPv6 here
				}
				return fmt.Errorf("no routing rules: %w", err)
			}
			first := rules[0]
			for _, r := range rules[1:] {
				if max(r.Priority, 0) < max(first.Priority, 0) {
					first = r
				}
			}
			if first.Table != unix.RT_TABLE_LOCAL || first.Src != nil || first.Dst != nil || first.Invert {
				wrong = append(wrong, fmt.Sprintf("routing rule %q comes before the local table", first.String()))
			}
		}
		return nil
	})
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	return wrong
}

func (sc *scope) verifyConntrack() (wrong []string) {
	entries, bound, err := sc.ct.fill()
	if err != nil {
		return []string{"conntrack cannot be read: " + err.Error()}
	}
	if entries >= bound {
		wrong = append(wrong, fmt.Sprintf("conntrack is full (%d of %d): new connections fail", entries, bound))
	}
	if n, err := sc.ct.drops(); err == nil && n > 0 {
		wrong = append(wrong, fmt.Sprintf("conntrack dropped %d packets since the scope was added, for want of room", n))
	}
	return wrong
}

// Limits names what this back end cannot do for a scope, for an operator to
// weigh; none of it means that something captured gets away uncovered today.
func (b *Backend) Limits(name string) []string {
	limits := []string{
		"callers are found through socket tables and /proc, after the fact: weaker evidence than a hook's",
		"a socket bound to a device other than lo cannot be redirected: its connect times out",
		"TCP segments that a program makes by hand (raw sockets, tcptraceroute) are redirected, or in enforce refused, like any other",
		"AF_PACKET and kernel-made tunnels pass below the rules: CAP_NET_RAW and CAP_NET_ADMIN are trusted",
	}
	if b.guard == nil {
		limits = append(limits, "no guard process: when the agent dies, scopes that should pass are refused; when it hangs, connections hang")
	}
	sc, err := b.scope(name)
	if err != nil {
		return limits
	}
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if sc.fw == nil {
		return limits
	}
	variant, mixed := sc.fw.Variant()
	if mixed {
		limits = append(limits, fmt.Sprintf("rules of others are in both variants of iptables; %s holds more and is used", variant))
	}
	if variant == fw.Legacy && len(sc.spec.cgroups) > 0 {
		limits = append(limits, "legacy iptables looks cgroup paths up anew at every change by anybody: a removed cgroup delays such changes until the rules follow")
	}
	return limits
}

// Tables tells the fill of the connection tracking table of each scope that
// redirects. Max is zero when it cannot be read.
func (b *Backend) Tables() []capture.Table {
	b.mu.Lock()
	scopes := make([]*scope, 0, len(b.scopes))
	for _, sc := range b.scopes {
		scopes = append(scopes, sc)
	}
	b.mu.Unlock()
	tables := b.watch.Tables()
	for _, sc := range scopes {
		sc.mu.Lock()
		redirects, ct := !sc.closed && sc.s.Mode != authz.Watch, sc.ct
		sc.mu.Unlock()
		if redirects {
			entries, bound, _ := ct.fill()
			tables = append(tables, capture.Table{Name: "conntrack/" + sc.name, Entries: entries, Max: bound})
		}
	}
	return tables
}

// Dropped is how many packets conntrack dropped for want of room since the scope
// was added.
func (b *Backend) Dropped(name string) (uint64, error) {
	sc, err := b.scope(name)
	if err != nil {
		return 0, err
	}
	sc.mu.Lock()
	ct := sc.ct
	sc.mu.Unlock()
	return ct.drops()
}

// usesIPv6 reports whether the namespace has an IPv6 address besides ::1. When it
// cannot be found out, it has.
func usesIPv6(s capture.Scope) bool {
	uses := true
	err := s.NS.Do(func() error {
		addrs, err := netlink.AddrList(nil, unix.AF_INET6)
		if err != nil {
			return err
		}
		uses = false
		for _, a := range addrs {
			ip, _ := netip.AddrFromSlice(a.IP)
			uses = uses || !ip.IsLoopback()
		}
		return nil
	})
	return err != nil || uses
}

func listens(fds []int, family int) bool {
	for _, fd := range fds {
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && domain == family {
			return true
		}
	}
	return false
}
