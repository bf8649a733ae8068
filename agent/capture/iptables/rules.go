package iptables

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"ringfence.dev/agent/capture"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/policy/authz"
)

// connMark is the bit of a connection's conntrack mark that says it was handed
// to the inbound listener. Bit 12 is left alone by kube-proxy (14 and 15), Istio
// (0 to 11), Cilium (8 to 11, 16 to 31), Calico and Tailscale (16 up). It proves
// nothing to anybody: it only keeps a captured connection captured.
const connMark = "0x1000/0x1000"

// syn matches the first segment of a connection, whatever its ECN bits are.
var syn = fw.R("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN")

// ownPorts are the agent's listeners.
var ownPorts = fmt.Sprintf("%d,%d,%d", capture.OutboundPort, capture.InboundPort, capture.TunnelPort)

// spec is all that the rules of one scope depend on.
type spec struct {
	leaf     string // the agent's own cgroup, from the cgroup v2 root
	mode     authz.Mode
	loopback bool   // capture what is sent over lo
	mark     uint32 // random, of this process; only used when loopback
	cgroups  []verdict
	ports    []port
	forwards map[fw.Family][]fw.Rule // what others' rules send on to another machine
}

// verdict says whether a cgroup and all below it are covered, unless a deeper
// one says otherwise. Deepest first.
type verdict struct {
	path    string
	covered bool
}

// port is a listening address that differs from its surroundings: not covered,
// or covered where a wildcard listener of the same port is not. Most specific first.
type port struct {
	addr    netip.Addr // unspecified means any address of the family
	port    uint16
	covered bool
}

// up gives the rules of a scope whose agent lives; none in watch mode.
func (s spec) up(f fw.Family) fw.Ruleset {
	if s.mode == authz.Watch {
		return nil
	}
	rules := fw.Ruleset{s.in(), s.own()}
	if s.mode == authz.Enforce {
		rules = append(rules, s.egress(false), s.block(f, false))
	}
	if s.loopback {
		rules = append(rules, s.stamp())
	}
	return append(rules, s.prerouting(f), s.capture(f), s.out(), s.redirect(f))
}

// down gives the rules of an enforcing scope whose agent is dead or hung: what
// would have been captured is refused, at once and with a reset.
func (s spec) down(f fw.Family) fw.Ruleset {
	return fw.Ruleset{s.inDown(f), s.egress(true), s.block(f, true)}
}

// in sends each SYN that is captured, or meant for the agent, past the owner check.
func (s spec) in() fw.Chain {
	return fw.Chain{Table: "filter", Name: "RINGFENCE_IN", Hook: "INPUT", Match: syn, Rules: []fw.Rule{
		fw.R("-p tcp -m multiport --dports " + ownPorts + " -g RINGFENCE_OWN"),
		fw.R("-m connmark --mark " + connMark + " -g RINGFENCE_OWN"),
	}}
}

// own lets a SYN pass only to a socket of the agent's cgroup. xt_cgroup never
// matches a packet without a socket, inverted or not, so the refusal is the last rule.
func (s spec) own() fw.Chain {
	return fw.Chain{Table: "filter", Name: "RINGFENCE_OWN", Rules: []fw.Rule{
		s.agent("-j", "RETURN"),
		fw.R("-p tcp -j REJECT --reject-with tcp-reset"),
	}}
}

func (s spec) inDown(f fw.Family) fw.Chain {
	c := fw.Chain{Table: "filter", Name: "RINGFENCE_IN", Hook: "INPUT", Match: syn}
	if !s.loopback {
		c.Rules = append(c.Rules, fw.R("-i lo -j RETURN"))
	}
	reject := fw.R("-p tcp -j REJECT --reject-with tcp-reset")
	c.Rules = append(c.Rules, fw.R("-p tcp -m multiport --dports "+ownPorts+" -j REJECT --reject-with tcp-reset"))
	c.Rules = append(c.Rules, s.portRules(f, reject)...)
	c.Rules = append(c.Rules, reject)
	return c
}

// egress is the net below the redirect, for enforcing scopes.
func (s spec) egress(down bool) fw.Chain {
	c := fw.Chain{Table: "filter", Name: "RINGFENCE_EGR", Hook: "OUTPUT", Rules: []fw.Rule{
		fw.R("-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN"),
	}}
	if !down || !s.loopback {
		c.Rules = append(c.Rules, fw.R("-o lo -j RETURN"))
	}
	c.Rules = append(c.Rules, s.agent("-j", "RETURN"))
	c.Rules = append(c.Rules, s.kernelSockets()...)
	c.Rules = append(c.Rules, s.classify("RINGFENCE_BLK")...)
	return c
}

// block refuses what a covered workload sends around the redirect. By the time
// filter OUTPUT is asked, a redirected SYN carries its new destination.
func (s spec) block(f fw.Family, down bool) fw.Chain {
	c := fw.Chain{Table: "filter", Name: "RINGFENCE_BLK"}
	if !down {
		c.Rules = append(c.Rules, fw.R("-d "+loopbackOf(f)+" -p tcp -m tcp --dport "+strconv.Itoa(capture.OutboundPort)+" -j RETURN"))
	}
	unreachable := "icmp-port-unreachable"
	if f == fw.IPv6 {
		unreachable = "icmp6-port-unreachable"
	}
	c.Rules = append(c.Rules,
		slices.Concat(syn, fw.R("-j REJECT --reject-with tcp-reset")),
		fw.R("-p tcp -j DROP"),
	)
	for _, proto := range []string{"33", "132", "136"} { // DCCP, SCTP, UDP-Lite: no nat rule would catch them
		c.Rules = append(c.Rules, fw.R("-p "+proto+" -j REJECT --reject-with "+unreachable))
	}
	return c
}

// stamp marks the agent's own connections over lo, and wipes forged marks.
func (s spec) stamp() fw.Chain {
	mark := fmt.Sprintf("%#x", s.mark)
	return fw.Chain{Table: "mangle", Name: "RINGFENCE_MRK", Hook: "OUTPUT", Match: syn, Rules: []fw.Rule{
		s.agent("-o", "lo", "-j", "MARK", "--set-xmark", mark+"/0xffffffff"),
		s.agent("-j", "RETURN"),
		fw.R("-m mark --mark " + mark + " -j MARK --set-xmark 0x0/0xffffffff"),
	}}
}

func (s spec) prerouting(f fw.Family) fw.Chain {
	c := fw.Chain{Table: "mangle", Name: "RINGFENCE_PRE", Hook: "PREROUTING", Match: fw.R("-p tcp"), Rules: []fw.Rule{
		// Attach the agent's listener to a SYN for one of its own ports, so that INPUT can see whose it is.
		slices.Concat(syn, fw.R("-m multiport --dports "+ownPorts+" -m socket --transparent --nowildcard"), tproxy(0, anyOf(f))),
		fw.R("-p tcp -m multiport --dports " + ownPorts + " -j RETURN"),
	}}
	if s.loopback {
		c.Rules = append(c.Rules, fw.R(fmt.Sprintf("-i lo -m mark --mark %#x -j RETURN", s.mark)))
	} else {
		c.Rules = append(c.Rules, fw.R("-i lo -j RETURN"))
	}
	c.Rules = append(c.Rules,
		slices.Concat(fw.R("-p tcp -m connmark --mark "+connMark+" -m conntrack --ctdir ORIGINAL"), tproxy(capture.InboundPort, loopbackOf(f))),
		fw.R("-m addrtype ! --dst-type LOCAL -j RETURN"),
	)
	// A packet with a socket attached cannot be forwarded any more, and a port that is
	// published to containers often has a local listener too.
	for _, match := range s.forwards[f] {
		c.Rules = append(c.Rules, slices.Concat(match, fw.R("-j RETURN")))
	}
	listening := slices.Concat(syn, fw.R("-m socket --nowildcard -g RINGFENCE_CAP"))
	c.Rules = append(c.Rules, s.portRules(f, listening)...)
	c.Rules = append(c.Rules, listening)
	return c
}

func (s spec) capture(f fw.Family) fw.Chain {
	return fw.Chain{Table: "mangle", Name: "RINGFENCE_CAP", Rules: []fw.Rule{
		fw.R("-j CONNMARK --set-xmark " + connMark),
		slices.Concat(fw.R("-p tcp"), tproxy(capture.InboundPort, loopbackOf(f))),
	}}
}

func (s spec) out() fw.Chain {
	c := fw.Chain{Table: "nat", Name: "RINGFENCE_OUT", Hook: "OUTPUT", Match: syn}
	c.Rules = append(c.Rules, s.agent("-j", "RETURN"))
	c.Rules = append(c.Rules, s.kernelSockets()...)
	c.Rules = append(c.Rules, s.classify("RINGFENCE_TO")...)
	return c
}

func (s spec) redirect(f fw.Family) fw.Chain {
	c := fw.Chain{Table: "nat", Name: "RINGFENCE_TO"}
	if s.loopback {
		// Who dials the agent's ports shall be seen to have done so.
		c.Rules = append(c.Rules, fw.R("-o lo -p tcp -m multiport --dports "+ownPorts+" -j RETURN"))
	} else {
		c.Rules = append(c.Rules, fw.R("-o lo -j RETURN"))
	}
	if f == fw.IPv6 {
		// A link-local destination needs its interface, which a redirect to ::1 loses.
		c.Rules = append(c.Rules, fw.R("-d fe80::/10 -j RETURN"))
	}
	c.Rules = append(c.Rules, fw.R("-p tcp -j REDIRECT --to-ports "+strconv.Itoa(capture.OutboundPort)))
	return c
}

// kernelSockets leaves alone what the kernel itself dials (NFS, iSCSI): such a
// socket has no file, and so matches no uid. A program can have the kernel dial for
// it (AF_SMC does), therefore an enforcing scope also asks for a privileged source
// port. Otherwise privileged source ports are left alone altogether: redirecting
// would not break them, but some servers trust nothing else. So are marked packets.
func (s spec) kernelSockets() []fw.Rule {
	noFile := fw.R("-m owner ! --uid-owner 0-4294967294")
	privileged := fw.R("-p tcp -m tcp --sport 1:1023")
	back := fw.R("-j RETURN")
	if s.mode == authz.Enforce {
		return []fw.Rule{slices.Concat(privileged, noFile, back)}
	}
	// A mark chooses a route, and the agent's dial has none.
	marked := fw.R("-m mark ! --mark 0x0")
	return []fw.Rule{slices.Concat(noFile, back), slices.Concat(privileged, back), slices.Concat(marked, back)}
}

// classify sends covered workloads to chain; what no verdict names is covered.
func (s spec) classify(chain string) (rules []fw.Rule) {
	for _, v := range s.cgroups {
		r := fw.Rule{"-m", "cgroup", "--path", v.path}
		if v.covered {
			rules = append(rules, append(r, "-g", chain))
		} else {
			rules = append(rules, append(r, "-j", "RETURN"))
		}
	}
	return append(rules, fw.Rule{"-j", chain})
}

// portRules treats the listening addresses that are no matter of ours, or are
// one although a wildcard on their port is not.
func (s spec) portRules(f fw.Family, covered fw.Rule) (rules []fw.Rule) {
	for _, p := range s.ports {
		if p.addr.Is4() != (f == fw.IPv4) {
			continue
		}
		r := fw.Rule{"--dport", strconv.Itoa(int(p.port))}
		if !p.addr.IsUnspecified() {
			r = append(fw.Rule{"-d", p.addr.String()}, r...)
		}
		if p.covered {
			rules = append(rules, slices.Concat(covered, r))
			continue
		}
		rules = append(rules, slices.Concat(fw.R("-p tcp -m tcp"), r, fw.R("-j RETURN")))
	}
	return rules
}

func (s spec) agent(tail ...string) fw.Rule {
	return append(fw.Rule{"-m", "cgroup", "--path", s.leaf}, tail...)
}

// tproxy sets no packet mark: the packet is for this machine, no routing has to
// be bent. Port zero keeps the packet's own.
func tproxy(port int, addr string) fw.Rule {
	return fw.R(fmt.Sprintf("-j TPROXY --on-port %d --on-ip %s --tproxy-mark 0x0/0x0", port, addr))
}

func loopbackOf(f fw.Family) string {
	if f == fw.IPv6 {
		return "::1"
	}
	return "127.0.0.1"
}

func anyOf(f fw.Family) string {
	if f == fw.IPv6 {
		return "::"
	}
	return "0.0.0.0"
}

// compress keeps of a cgroup table only what changes the verdict of the nearest
// listed ancestor, and sorts it deepest first. Usually little is left: packets
// are compared with each rule in turn.
func compress(table []capture.Cgroup) []verdict {
	byPath := map[string]bool{}
	for _, c := range table {
		byPath[clean(c.Path)] = takesBelow(c)
	}
	var kept []verdict
	for path, covered := range byPath {
		if path != "/" && covered != inherited(byPath, path) || path == "/" && !covered {
			kept = append(kept, verdict{path, covered})
		}
	}
	slices.SortFunc(kept, func(a, b verdict) int {
		return cmp.Or(depth(b.path)-depth(a.path), cmp.Compare(a.path, b.path))
	})
	return kept
}

// takesBelow says what a rule about a cgroup does, which takes all below it as well,
// cgroups that do not exist yet included. Where one of those may be covered it
// captures, and the agent sorts out who was meant. Not so the root: nearly all of a
// host that is left alone is directly in it, on many hosts.
func takesBelow(c capture.Cgroup) bool {
	return c.Covered || c.Below && clean(c.Path) != "/"
}

func inherited(byPath map[string]bool, path string) bool {
	for path != "/" {
		path = parent(path)
		if covered, ok := byPath[path]; ok {
			return covered
		}
	}
	return true
}

func depth(path string) int {
	if path == "/" {
		return 0
	}
	return strings.Count(path, "/")
}

func parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "/"
}

func clean(path string) string { return "/" + strings.Trim(path, "/") }
