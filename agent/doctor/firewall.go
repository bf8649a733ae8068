package doctor

import (
	"context"
	"errors"
	"os/exec"
	"strings"
)

// rulesOf reads the packet filter of this network namespace through whatever
// tool is there. No tool means that nobody wrote rules with one.
func rulesOf(ctx context.Context) (string, error) {
	var all strings.Builder
	var failed []error
	tried := 0
	for _, args := range [][]string{{"nft", "list", "ruleset"}, {"iptables-legacy-save"}, {"iptables-save"}} {
		path, err := exec.LookPath(args[0])
		if err != nil {
			continue
		}
		tried++
		out, err := exec.CommandContext(ctx, path, args[1:]...).Output()
		if err != nil {
			failed = append(failed, errors.New(strings.Join(args, " ")+": "+err.Error()))
			continue
		}
		all.Write(out)
		all.WriteByte('\n')
	}
	if tried > 0 && len(failed) == tried {
		return "", errors.Join(failed...)
	}
	return all.String(), nil
}

// closes reports whether rules, in nft's or iptables-save's language, drop what
// comes in by default without saying a word of port 15008. It errs on the
// side of a needless warning: a rule for a range of ports is not understood.
func closes(rules string) bool {
	if strings.Contains(rules, "15008") {
		return false
	}
	for _, line := range strings.Split(rules, "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, ":INPUT DROP") {
			return true
		}
		if strings.HasPrefix(line, "type filter hook input") && strings.Contains(line, "policy drop") {
			return true
		}
		if strings.HasPrefix(line, "-A INPUT") && lastVerdict(line) {
			return true
		}
	}
	return false
}

// lastVerdict reports whether an iptables rule refuses everything: nothing but a target.
func lastVerdict(line string) bool {
	rest := strings.TrimPrefix(line, "-A INPUT ")
	return rest == "-j DROP" || rest == "-j REJECT" || strings.HasPrefix(rest, "-j REJECT --reject-with")
}
