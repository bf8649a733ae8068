package doctor

import (
	"slices"
	"strings"
)

// bypass names each known way past capture, and what closes it on this host.
// Capture gives identity; the boundary is the other end's: whoever got past
// capture shows no identity there, and is refused.
func (e *examination) bypass() {
	row := func(name string, closed bool, how, open string) {
		c := Check{Group: "bypass", Name: name, State: Found, Detail: how}
		if !closed {
			c.State, c.Detail, c.Cost = Missing, open, "such traffic leaves without identity; the other end's agent refuses it where it enforces"
		}
		e.add(c)
	}
	hooks, rules := e.ebpf, e.packet // what captures, with the settings that were asked for
	switch e.options.Capture {
	case "observe":
		hooks, rules = false, false
	case "iptables":
		hooks = false
	case "ebpf":
		rules = false
	}
	either := func(withHooks, withRules string) string {
		if hooks {
			return withHooks
		}
		return withRules
	}
	row("connect, io_uring, TCP fast open", hooks || rules, "captured", "nothing captures")
	row("IPv4 inside IPv6 sockets", hooks || rules, "captured", "nothing captures")
	row("Multipath TCP", hooks || rules, either("the socket is refused in enforcing scopes",
		"captured; the agent's listener speaks plain TCP, so no further subflows are made"), "nothing captures")
	row("UDP-Lite, SCTP, DCCP sockets", hooks || rules, either("refused in enforcing scopes", "their packets are refused in enforcing scopes"),
		"not refused: no sock_create hook")
	row("raw IP sockets", hooks, "refused in enforcing scopes",
		"not refused: no sock_create hook; take CAP_NET_RAW from workloads (hand-made TCP segments meet the packet filter like any other)")
	lsm := e.bpfLSM()
	row("packet, vsock, SMC, XDP and TIPC sockets", false, "",
		"not refused ("+lsmText(lsm)+"): take CAP_NET_RAW from workloads, and block the modules")
	row("sockets received from outside the scope", hooks, "who uses the socket counts, whoever made it",
		"the maker's cgroup counts, not the user's: in a host scope an uncovered program can hand a socket to a covered one")
	row("connections open before the scope was added", false, "", "listed as uncovered in `ringfence status`; restart those programs")
	row("binding the agent's ports while it is down", hooks || rules, either("refused by the bind hook",
		"what is captured is refused by a packet filter rule when another's listener would get it"), "nothing captures")
	row("UDP, QUIC", false, "", "not captured: only TCP is")
	row("moving a process out of its cgroup (host scope)", false, "", "possible for whoever may write to the cgroup tree: root only, unless it was delegated")
	row("becoming another program after connect", hooks, "the program that connected counts, not the one it became",
		"who is calling is found after the fact: a program that connects and at once becomes another passes for that one, so let entries name units, not paths")
	row("traffic forwarded for another namespace", false, "", "a program with CAP_NET_ADMIN in a scope can make a namespace of its own behind it; take CAP_NET_ADMIN and CAP_SYS_ADMIN from workloads")
	row("rules removed by a program with CAP_NET_ADMIN", hooks, "the hooks cannot be reached from inside a scope",
		"noticed by the agent's own check and written again; until then traffic is in clear")
}

// bpfLSM reports whether BPF LSM programs run on this boot.
func (e *examination) bpfLSM() bool {
	text, err := e.host.lsm()
	return err == nil && slices.Contains(strings.Split(strings.TrimSpace(text), ","), "bpf")
}

func lsmText(active bool) string {
	if active {
		return "BPF LSM is active but not used yet"
	}
	return "would need bpf in the kernel's lsm= boot list"
}
