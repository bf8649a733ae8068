package iptables

import (
	"cmp"
	"context"
	"slices"
	"strings"
)

// Forwards returns what the rules of others match on that send TCP connections,
// arriving for one of this machine's ports, to another destination: ports that
// a container engine publishes. Each is the rule without its target, in a
// stable order. Rules of both variants count.
func (n *Namespace) Forwards(ctx context.Context, f Family) (matches []Rule, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	err = n.ns.Do(func() error {
		for _, v := range n.usable {
			have, err := n.tools.read(ctx, v, f)
			if err != nil {
				return err
			}
			matches = append(matches, have.forwards()...)
		}
		return nil
	})
	slices.SortFunc(matches, func(a, b Rule) int { return cmp.Compare(strings.Join(a, " "), strings.Join(b, " ")) })
	return slices.CompactFunc(matches, func(a, b Rule) bool { return slices.Equal(a, b) }), err
}

func (s state) forwards() (matches []Rule) {
	for chain, rules := range s["nat"] {
		// OUTPUT sees what this machine itself sends; its matches mean nothing elsewhere.
		if own(chain) || chain == "OUTPUT" || chain == "POSTROUTING" {
			continue
		}
		for _, r := range rules {
			port := slices.Contains(r, "--dport") || slices.Contains(r, "--dports")
			at := slices.Index(r, "-j")
			if r.target() == "DNAT" && port && at > 0 && !slices.Contains(r[:at], "-o") {
				matches = append(matches, slices.Clone(r[:at]))
			}
		}
	}
	return matches
}
