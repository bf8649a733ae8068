package doctor

import (
	"fmt"
	"net/netip"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/cni/netns"
)

// ports looks whether somebody else listens where the agent wants to.
func (e *examination) ports() {
	self, err := netns.Self()
	if err != nil {
		e.add(Check{Group: "network", Name: "ports", State: Unknown, Detail: err.Error()})
		return
	}
	defer self.Close()
	socks, err := sockdiag.Listeners(self)
	if err != nil {
		e.add(Check{Group: "network", Name: "ports", State: Unknown, Detail: err.Error()})
		return
	}
	want := map[uint16]string{
		capture.OutboundPort: "outbound capture", capture.InboundPort: "inbound capture", capture.TunnelPort: "the tunnel",
	}
	for name, listen := range map[string]string{"metrics": e.options.MetricsListen, "readiness": e.options.ReadinessListen} {
		if at, err := netip.ParseAddrPort(listen); err == nil && at.Port() != 0 {
			want[at.Port()] = name
		}
	}
	clash := false
	for _, s := range socks {
		use, ours := want[s.Source.Port()]
		if !ours {
			continue
		}
		holders, _ := proc.Holders(s.Inode) // without them the port alone is named
		var pid uint32
		if len(holders) > 0 {
			pid = holders[0].PID
		}
		if e.options.AgentPID != 0 && pid == uint32(e.options.AgentPID) {
			continue
		}
		clash = true
		e.add(Check{Group: "network", Name: fmt.Sprintf("port %d", s.Source.Port()), State: Broken,
			Detail: fmt.Sprintf("%s is taken by process %d (%s)", s.Source, pid, use),
			Fix:    "stop that program, or let it listen elsewhere; metrics and readiness can be moved in the settings"})
	}
	if !clash {
		e.add(Check{Group: "network", Name: "ports", State: Found, Detail: "15001, 15006, 15008, metrics and readiness are free or the agent's"})
	}
}
