// Package iptables keeps a set of packet filter rules of our own in a network
// namespace: it writes all of them in one iptables-restore transaction, reads
// them back, compares, and takes them away again without touching a rule of
// anybody else.
//
// It is not a general iptables library: it knows only whole chains whose names
// begin with [Prefix], each reached by at most one jump from a built-in chain.
//
// The invariant: between two calls a namespace holds each of our chains once,
// in one variant of iptables (nft or legacy), never in both. Rules that are
// doubled in the other variant redirect a connection twice, and it hangs.
package iptables

import (
	"slices"
	"strings"
)

// Prefix begins the name of every chain that belongs to us. Whatever carries it
// is replaced by Apply and removed by Remove, also when a former version wrote it.
const Prefix = "RINGFENCE_"

// Family is an address family, with its own tables and its own programs.
type Family int

const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both, in the order in which they are written.
var Families = []Family{IPv4, IPv6}

func (f Family) String() string {
	if f == IPv6 {
		return "IPv6"
	}
	return "IPv4"
}

// Rule is one rule as arguments of iptables, without the chain: "-p", "tcp",
// "-j", "RETURN". An argument may hold any character but a newline.
type Rule []string

// R splits a rule at blanks, for rules whose arguments hold none.
func R(text string) Rule { return strings.Fields(text) }

// Chain is one chain of ours.
type Chain struct {
	Table string // "filter", "mangle" or "nat"
	Name  string // begins with Prefix, at most 28 characters
	// Hook is the built-in chain that jumps here from its first place, empty when
	// only other chains of ours do. Match is what the jump itself matches on.
	Hook  string
	Match Rule
	Rules []Rule
}

// Ruleset is what one family of a namespace shall hold. Chains are in any order;
// the tables are written filter first and nat last, so that where each table is
// its own transaction (legacy) nothing is redirected before it is guarded.
type Ruleset []Chain

var tableOrder = []string{"filter", "mangle", "nat"}

func (c Chain) jump() Rule { return slices.Concat(c.Match, Rule{"-j", c.Name}) }

// own reports whether a chain name is one of ours.
func own(chain string) bool { return strings.HasPrefix(chain, Prefix) }

// target is the chain that a rule goes to, or "".
func (r Rule) target() string {
	for i, arg := range r {
		if (arg == "-j" || arg == "-g" || arg == "--jump" || arg == "--goto") && i+1 < len(r) {
			return r[i+1]
		}
	}
	return ""
}

// protocols are names that iptables prints in place of numbers, according to
// the machine's /etc/protocols, which may be missing.
var protocols = map[string]string{"6": "tcp", "17": "udp", "33": "dccp", "132": "sctp", "136": "udplite"}

// canonical writes a rule so that two spellings of the same rule compare equal:
// options are sorted, a protocol's implied match is left out, host masks too.
func (r Rule) canonical() string {
	var options []string
	for i := 0; i < len(r); {
		option := ""
		if r[i] == "!" && i+1 < len(r) {
			option, i = "! ", i+1
		}
		start := i
		for i++; i < len(r) && r[i] != "!" && !isOption(r[i]); i++ {
		}
		if text := canonicalOption(r[start:i]); text != "" {
			options = append(options, option+text)
		}
	}
	slices.Sort(options)
	return strings.Join(options, " ")
}

func isOption(arg string) bool { return len(arg) > 1 && arg[0] == '-' }

func canonicalOption(args []string) string {
	if len(args) != 2 {
		return strings.Join(quoteAll(args), " ")
	}
	name, value := args[0], args[1]
	switch name {
	case "-m":
		if value == "tcp" || value == "udp" {
			return ""
		}
	case "-p":
		if known, ok := protocols[value]; ok {
			value = known
		}
	case "-s", "-d":
		value = strings.TrimSuffix(strings.TrimSuffix(value, "/32"), "/128")
	}
	return name + " " + quote(value)
}

func quoteAll(args []string) []string {
	quoted := make([]string, len(args))
	for i, arg := range args {
		quoted[i] = quote(arg)
	}
	return quoted
}

// quote writes an argument as iptables-restore reads it: in double quotes, with
// a backslash before a quote or a backslash. Names of cgroups hold both
// (systemd writes a dash in a name as \x2d) and may be chosen by a hostile user.
func quote(arg string) string {
	plain := func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:,=!@+", r))
	}
	if arg != "" && !strings.ContainsFunc(arg, plain) {
		return arg
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(arg) + `"`
}
