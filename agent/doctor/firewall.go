package doctor

import (
	"regexp"
	"strconv"
	"strings"

	"ringfence.dev/agent/capture"
)

// firewall looks for a packet filter that closes the tunnel's port.
func (e *examination) firewall() {
	c := Check{Group: "network", Name: "firewall before port 15008", State: Found, Detail: "none that closes it"}
	text, err := e.host.rules(e.ctx)
	switch {
	case err != nil:
		c.State, c.Detail = Unknown, err.Error()
	case closes(text):
		c.State, c.Detail = Warning, "incoming connections to port 15008 are dropped or rejected"
		c.Cost = "other hosts' agents cannot reach this one"
		c.Fix = "allow TCP port 15008 from the hosts of your mesh, such as: nft insert rule inet filter input tcp dport 15008 accept"
	}
	e.add(c)
}

// closes reports whether rules, in nft's or iptables-save's language, keep
// connections from port 15008: by a rule that names it, or by default while no
// rule lets it in. It is a reader of rules, not the kernel: sets, maps and jumps
// are not followed, and in doubt it warns.
func closes(rules string) bool {
	shut, input := false, false
	for _, line := range strings.Split(rules, "\n") {
		line = strings.TrimSpace(line)
		switch {
		case strings.Contains(strings.ToLower(line), "ringfence"):
			continue // our own rules say nothing of somebody's firewall
		case namesTunnel(line) && accepts.MatchString(line):
			return false
		case namesTunnel(line) && refuses.MatchString(line):
			return true
		case strings.HasPrefix(line, "chain "):
			input = false
		case strings.HasPrefix(line, "type filter hook input"):
			input = true
			shut = shut || strings.Contains(line, "policy drop")
		case strings.HasPrefix(line, ":INPUT DROP"), strings.HasPrefix(line, "-A INPUT") && lastVerdict(line):
			shut = true
		case input && bareVerdict.MatchString(line):
			shut = true
		}
	}
	return shut
}

var (
	accepts = regexp.MustCompile(`(^|\s)(-j ACCEPT|accept)(\s|$)`)
	refuses = regexp.MustCompile(`(^|\s)(-j (DROP|REJECT)|drop|reject)(\s|$)`)
	// bareVerdict is an nft rule that refuses whatever reaches it.
	bareVerdict = regexp.MustCompile(`^(counter( packets \d+ bytes \d+)? )?(drop|reject( with .*)?)$`)
	// ports is what follows the name of destination ports: numbers, lists, ranges.
	ports = regexp.MustCompile(`dports?\s+(\{[^}]*\}|\S+)`)
	spans = regexp.MustCompile(`(\d+)(?:\s*[-:]\s*(\d+))?`)
)

// namesTunnel reports whether a rule matches the tunnel's port by number or range.
func namesTunnel(line string) bool {
	for _, m := range ports.FindAllStringSubmatch(line, -1) {
		for _, span := range spans.FindAllStringSubmatch(m[1], -1) {
			lo, _ := strconv.Atoi(span[1]) // digits; too many of them are no port
			hi := lo
			if span[2] != "" {
				hi, _ = strconv.Atoi(span[2])
			}
			if lo <= capture.TunnelPort && capture.TunnelPort <= hi {
				return true
			}
		}
	}
	return false
}

// lastVerdict reports whether an iptables rule refuses everything: nothing but a target.
func lastVerdict(line string) bool {
	rest := strings.TrimPrefix(line, "-A INPUT ")
	return rest == "-j DROP" || rest == "-j REJECT" || strings.HasPrefix(rest, "-j REJECT --reject-with")
}
