package doctor

import (
	"os"
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
	hooks := e.ebpf
	row("connect, io_uring, TCP fast open", hooks || e.packet, "captured", "nothing captures")
	row("IPv4 inside IPv6 sockets", hooks || e.packet, "captured", "nothing captures")
	row("Multipath TCP", hooks, "the socket is refused in enforcing scopes", "further subflows are not seen: no sock_create hook")
	row("UDP-Lite, SCTP, DCCP sockets", hooks, "refused in enforcing scopes", "not refused: no sock_create hook")
	row("raw IP sockets", hooks, "refused in enforcing scopes", "not refused: no sock_create hook; take CAP_NET_RAW from workloads")
	lsm := bpfLSM()
	row("packet, vsock, XDP and TIPC sockets", false, "",
		"not refused ("+lsmText(lsm)+"): take CAP_NET_RAW from workloads, and block the modules")
	row("sockets received from outside the scope", hooks, "the namespace counts, not where the socket was made",
		"a socket made in another namespace and handed over is not seen")
	row("connections open before the scope was added", false, "", "listed as uncovered in `ringfence status`; restart those programs")
	row("binding the agent's ports while it is down", hooks, "refused by the bind hook",
		"a redirected connection to another's listener is refused by a packet filter rule")
	row("UDP, QUIC", false, "", "not captured: only TCP is")
	row("moving a process out of its cgroup (host scope)", false, "", "possible for whoever may write to the cgroup tree: root only, unless it was delegated")
	row("rules removed by a program with CAP_NET_ADMIN", hooks, "the hooks cannot be reached from inside a scope",
		"noticed by the agent's own check and written again; until then traffic is in clear")
}

// bpfLSM reports whether BPF LSM programs run on this boot.
func bpfLSM() bool {
	data, err := os.ReadFile("/sys/kernel/security/lsm")
	if err != nil {
		return false
	}
	for _, name := range strings.Split(strings.TrimSpace(string(data)), ",") {
		if name == "bpf" {
			return true
		}
	}
	return false
}

func lsmText(active bool) string {
	if active {
		return "BPF LSM is active but not used yet"
	}
	return "would need bpf in the kernel's lsm= boot list"
}
