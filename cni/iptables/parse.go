package iptables

import (
	"errors"
	"fmt"
	"strings"
)

// state is what iptables-save printed: per table and chain the rules in order.
// A chain without rules is present with none.
type state map[string]map[string][]Rule

var errSyntax = errors.New("iptables: unexpected output of iptables-save")

// parseSave reads the output of iptables-save. Comments and counters are left
// out. Other people's rules are read too: where our jump stands among them matters.
func parseSave(text string) (state, error) {
	s := state{}
	var chains map[string][]Rule
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#':
		case line == "COMMIT":
			chains = nil
		case line[0] == '*':
			chains = map[string][]Rule{}
			s[line[1:]] = chains
		case chains == nil:
			return nil, fmt.Errorf("%w: %.80q outside of a table", errSyntax, line)
		case line[0] == ':':
			name, _, _ := strings.Cut(line[1:], " ")
			chains[name] = nil
		default:
			args, err := splitArgs(line)
			if err != nil || len(args) < 2 || args[0] != "-A" {
				return nil, fmt.Errorf("%w: %.80q", errSyntax, line)
			}
			chains[args[1]] = append(chains[args[1]], args[2:])
		}
	}
	return s, nil
}

// splitArgs splits a line as iptables-restore does: blanks separate, double
// quotes hold together, and inside them a backslash takes the next character
// as it is.
func splitArgs(line string) ([]string, error) {
	var args []string
	var arg strings.Builder
	started, quoted := false, false
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case quoted && c == '\\' && i+1 < len(line):
			i++
			arg.WriteByte(line[i])
		case c == '"':
			quoted, started = !quoted, true
		case !quoted && (c == ' ' || c == '\t'):
			if started {
				args = append(args, arg.String())
				arg.Reset()
				started = false
			}
		default:
			arg.WriteByte(c)
			started = true
		}
	}
	if quoted {
		return nil, fmt.Errorf("%w: quote does not end", errSyntax)
	}
	if started {
		args = append(args, arg.String())
	}
	return args, nil
}

// foreign counts the rules that are not ours, chains of ours and jumps to them left out.
func (s state) foreign() (n int) {
	for _, chains := range s {
		for name, rules := range chains {
			if own(name) {
				continue
			}
			for _, r := range rules {
				if !own(r.target()) {
					n++
				}
			}
		}
	}
	return n
}

// holdsOwn reports whether any chain of ours, or a jump to one, is there.
func (s state) holdsOwn() bool {
	for _, chains := range s {
		for name, rules := range chains {
			if own(name) {
				return true
			}
			for _, r := range rules {
				if own(r.target()) {
					return true
				}
			}
		}
	}
	return false
}

// diff names each way in which the namespace differs from what it shall hold;
// nothing means equal. A jump that is no longer the first rule of its built-in
// chain is a difference: what stands before it may take packets away from us.
func (s state) diff(want Ruleset) (wrong []string) {
	wanted := map[string]bool{}
	for _, c := range want {
		wanted[c.Table+" "+c.Name] = true
		rules, ok := s[c.Table][c.Name]
		if !ok {
			wrong = append(wrong, fmt.Sprintf("chain %s in table %s is missing", c.Name, c.Table))
			continue
		}
		wrong = append(wrong, diffChain(c, rules)...)
		if c.Hook != "" {
			wrong = append(wrong, diffJump(c, s[c.Table][c.Hook])...)
		}
	}
	for table, chains := range s {
		for name, rules := range chains {
			mark := name == madeHere && len(rules) == 0 && want.uses(table)
			if own(name) && !wanted[table+" "+name] && !mark {
				wrong = append(wrong, fmt.Sprintf("chain %s in table %s is left over", name, table))
			}
		}
	}
	return wrong
}

func diffChain(c Chain, have []Rule) []string {
	if len(have) != len(c.Rules) {
		return []string{fmt.Sprintf("chain %s in table %s has %d rules in place of %d", c.Name, c.Table, len(have), len(c.Rules))}
	}
	var wrong []string
	for i, r := range c.Rules {
		if got, want := have[i].canonical(), r.canonical(); got != want {
			wrong = append(wrong, fmt.Sprintf("rule %d of %s in table %s is %q in place of %q", i+1, c.Name, c.Table, got, want))
		}
	}
	return wrong
}

func diffJump(c Chain, hook []Rule) []string {
	jumps := 0
	for _, r := range hook {
		if r.target() == c.Name {
			jumps++
		}
	}
	switch {
	case jumps == 0:
		return []string{fmt.Sprintf("%s in table %s does not jump to %s", c.Hook, c.Table, c.Name)}
	case jumps > 1:
		return []string{fmt.Sprintf("%s in table %s jumps to %s %d times", c.Hook, c.Table, c.Name, jumps)}
	case hook[0].canonical() != c.jump().canonical():
		return []string{fmt.Sprintf("%s in table %s has other rules before the jump to %s", c.Hook, c.Table, c.Name)}
	}
	return nil
}
