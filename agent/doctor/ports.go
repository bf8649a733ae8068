package doctor

import (
	"fmt"
	"net/netip"

	"ringfence.dev/agent/capture"
)

// ports looks whether somebody else listens where the agent wants to.
func (e *examination) ports() {
	all, err := e.host.listening()
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
	for _, l := range all {
		use, wanted := want[l.at.Port()]
		if !wanted || e.options.AgentPID != 0 && l.pid == uint32(e.options.AgentPID) {
			continue
		}
		clash = true
		e.add(portClash(l, use))
	}
	if !clash {
		e.add(Check{Group: "network", Name: "ports", State: Found, Detail: "15001, 15006, 15008, metrics and readiness are free or the agent's"})
	}
}

func portClash(l listener, use string) Check {
	by := "somebody who cannot be told from here"
	if l.pid != 0 {
		by = fmt.Sprintf("process %d", l.pid)
	}
	return Check{Group: "network", Name: fmt.Sprintf("port %d", l.at.Port()), State: Broken,
		Detail: fmt.Sprintf("%s is taken by %s (wanted for %s)", l.at, by, use),
		Fix:    "stop that program, or let it listen elsewhere; metrics and readiness can be moved in the settings"}
}
