package iptables

import (
	"testing"

	"ringfence.dev/policy/authz"
)

// What a dry run must not disturb: what a redirect would break, or what is
// on its way to somewhere else.
func TestDryRunDisturbsNothing(t *testing.T) {
	h := newHost(t, "", nil)
	h.scope.Host = true
	serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
	h.ns.Exec(t, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
	h.ns.Exec(t, "iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "8088", "-j", "DNAT", "--to-destination", "192.0.2.2:8080")
	h.ns.Exec(t, "iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
	serveWorkload(t, h.ns, cg.work, "0.0.0.0:8088") // as a container engine's proxy does
	h.add(authz.DryRun)
	h.want(cg.work, "peer", "192.0.2.2:8080", "from=192.0.2.1:700")
	h.want(cg.work, "peer", "192.0.2.2:8080", "mark=77") // a mark chooses a route
	h.want(cg.work, "outbound 192.0.2.2:8080", "192.0.2.2:8080")
	h.wantPeer("peer", "192.0.2.1:8088")
}
