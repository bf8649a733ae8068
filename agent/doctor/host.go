package doctor

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	fw "ringfence.dev/cni/iptables"
)

func (e *examination) privilege() {
	e.root = e.host.euid() == 0
	c := Check{Group: "host", Name: "root", State: Found}
	if !e.root {
		c.State, c.Fix = Broken, "run this, and the agent, as root: much of what follows cannot be told without"
	}
	e.add(c)
}

func (e *examination) iptables() {
	c := Check{Group: "kernel", Name: "iptables", State: Found,
		Detail: "used only where eBPF is not: who is calling is then found after the fact, through socket tables and /proc, which is weaker evidence than the connect hook's"}
	names, err := e.host.variants(e.ctx)
	if err == nil {
		e.packet = true
		c.Detail = strings.Join(names, " and ") + "; " + c.Detail
	} else {
		c.State, c.Detail = Missing, err.Error()
		c.Cost = "no fallback on kernels without the eBPF hooks"
		c.Fix = "install the iptables package"
		if !errors.Is(err, fw.ErrNotFound) {
			c.State = Unknown
		}
	}
	e.add(c)
}

// minDescriptors is two sockets each for ten thousand connections, and what else is open.
const minDescriptors = 20_480

func (e *examination) cgroups() {
	c := Check{Group: "host", Name: "cgroup v2", State: Found}
	root, err := e.host.cgroupRoot()
	c.Detail, e.leaf = root, err == nil
	if err != nil {
		c.State, c.Detail, c.Cost = Broken, err.Error(), "the agent cannot tell its own connections from the workloads', so nothing can be redirected"
		c.Fix = "mount it: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
	}
	e.add(c)
}

func (e *examination) ipv6() {
	c := Check{Group: "host", Name: "IPv6", State: Found}
	if err := e.host.ipv6(); err != nil {
		c.State, c.Detail, c.Cost = Missing, err.Error(), "nothing: programs have no IPv6 either"
	}
	e.add(c)
}

func (e *examination) descriptors() {
	c := Check{Group: "host", Name: "descriptors", State: Found}
	most, err := e.host.nofile()
	if err != nil {
		c.State, c.Detail = Unknown, err.Error()
	} else if c.Detail = fmt.Sprintf("hard limit %d", most); most < minDescriptors {
		c.State, c.Cost = Warning, fmt.Sprintf("about %d connections at once", most/2)
		c.Fix = "raise LimitNOFILE of the agent's unit"
	}
	e.add(c)
}

func (e *examination) clock() {
	c := Check{Group: "host", Name: "clock", State: Found}
	state, err := e.host.adjtime()
	switch now := e.host.now(); {
	case now.Year() < 2025:
		c.State, c.Detail = Broken, "the clock says "+now.Format(time.DateOnly)
		c.Cost, c.Fix = "certificates cannot be valid", "set the clock"
	case err != nil:
		c.State, c.Detail = Unknown, err.Error()
	case state == unix.TIME_ERROR:
		c.State, c.Detail = Warning, "nothing keeps the clock synchronized"
		c.Cost = "when clocks drift apart certificates are refused at their edges"
		c.Fix = "run an NTP client, such as systemd-timesyncd or chrony"
	}
	e.add(c)
}

// owners names other programs at the cgroup root: they see connections too, and some rewrite them.
func (e *examination) owners() {
	root, err := e.host.cgroupRoot()
	if err != nil {
		return
	}
	c := Check{Group: "network", Name: "other BPF programs", State: Found, Detail: "none at the cgroup root"}
	owners, err := e.host.owners(root)
	if err != nil {
		c.State, c.Detail = Unknown, err.Error()
		e.add(c)
		return
	}
	var foreign, ours []string
	for _, o := range owners {
		text := fmt.Sprintf("%s (%s, id %d)", or(o.Name, "unnamed"), o.Attach, o.Program)
		if o.Ringfence {
			ours = append(ours, text)
		} else {
			foreign = append(foreign, text)
		}
	}
	if len(ours) > 0 {
		c.Detail = fmt.Sprintf("%d of ringfence", len(ours))
	}
	if len(foreign) > 0 {
		c.State, c.Detail = Warning, strings.Join(foreign, ", ")
		c.Cost = "a service load balancer there (Cilium's socket LB, say) rewrites destinations before or after ringfence sees them"
		c.Fix = "with Cilium set socketLB.hostNamespaceOnly=true"
	}
	e.add(c)
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
