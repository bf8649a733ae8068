package iptables

import (
	"maps"
	"slices"
	"strings"
)

// transaction writes the iptables-restore input that turns the present state
// into the wanted one. It touches only our chains and the jumps to them, and is
// empty when there is nothing to do. Naming a chain of ours in a --noflush
// restore empties it, so rules never pile up.
func transaction(have state, want Ruleset) string {
	var b strings.Builder
	for _, table := range tables(have) {
		writeTable(&b, table, have[table], want)
	}
	return b.String()
}

// tables are those in our order, then whatever else holds something of ours.
func tables(have state) []string {
	order := slices.Clone(tableOrder)
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if !slices.Contains(order, name) {
			order = append(order, name)
		}
	}
	return order
}

func writeTable(b *strings.Builder, table string, have map[string][]Rule, want Ruleset) {
	var lines, stale []string
	for name := range have {
		if own(name) && !want.has(table, name) {
			stale = append(stale, name)
		}
	}
	slices.Sort(stale)
	for _, name := range stale {
		lines = append(lines, ":"+name+" - [0:0]")
	}
	for _, c := range want {
		if c.Table == table {
			lines = append(lines, ":"+c.Name+" - [0:0]")
		}
	}
	lines = append(lines, jumps(table, have, want)...)
	for _, c := range want {
		if c.Table != table {
			continue
		}
		for _, r := range c.Rules {
			lines = append(lines, line("-A", c.Name, r))
		}
	}
	for _, name := range stale {
		lines = append(lines, "-X "+name)
	}
	if len(lines) > 0 {
		b.WriteString("*" + table + "\n" + strings.Join(lines, "\n") + "\nCOMMIT\n")
	}
}

// jumps takes every present jump to a chain of ours away and sets the wanted
// ones, each in the first place, unless all is already so.
func jumps(table string, have map[string][]Rule, want Ruleset) (lines []string) {
	settled := map[string]bool{}
	for _, c := range want {
		if c.Table == table && c.Hook != "" && len(diffJump(c, have[c.Hook])) == 0 {
			settled[c.Name] = true
		}
	}
	for _, chain := range slices.Sorted(maps.Keys(have)) {
		if own(chain) {
			continue
		}
		for _, r := range have[chain] {
			if own(r.target()) && !settled[r.target()] {
				lines = append(lines, line("-D", chain, r))
			}
		}
	}
	for _, c := range want {
		if c.Table == table && c.Hook != "" && !settled[c.Name] {
			lines = append(lines, line("-I", c.Hook+" 1", c.jump()))
		}
	}
	return lines
}

func line(verb, chain string, r Rule) string {
	return verb + " " + chain + " " + strings.Join(quoteAll(r), " ")
}

func (s Ruleset) has(table, name string) bool {
	return slices.ContainsFunc(s, func(c Chain) bool { return c.Table == table && c.Name == name })
}

// check refuses what would write outside of our own chains, or more than one line.
func (s Ruleset) check() error {
	for _, c := range s {
		if !own(c.Name) || len(c.Name) > 28 || !slices.Contains(tableOrder, c.Table) {
			return badChain(c)
		}
		for _, r := range append([]Rule{c.Match}, c.Rules...) {
			if slices.ContainsFunc(r, func(arg string) bool { return strings.ContainsAny(arg, "\n\r\x00") }) {
				return badChain(c)
			}
		}
	}
	return nil
}
