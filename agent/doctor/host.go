package doctor

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/bpf"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/cni/netns"
)

func (e *examination) privilege() {
	e.root = os.Geteuid() == 0
	c := Check{Group: "host", Name: "root", State: Found}
	if !e.root {
		c.State, c.Fix = Broken, "run this, and the agent, as root: much of what follows cannot be told without"
	}
	e.add(c)
}

func (e *examination) iptables() {
	c := Check{Group: "kernel", Name: "iptables", State: Found,
		Detail: "used only where eBPF is not: who is calling is then found after the fact, through socket tables and /proc, which is weaker evidence than the connect hook's"}
	tools, err := fw.Find(e.ctx)
	if err == nil {
		e.packet = true
		var names []string
		for _, v := range tools.Variants() {
			names = append(names, string(v))
		}
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

func (e *examination) host() {
	c := Check{Group: "host", Name: "cgroup v2", State: Found}
	root, err := bpf.CgroupRoot()
	c.Detail = root
	if err != nil {
		c.State, c.Detail, c.Cost = Broken, err.Error(), "the agent cannot tell its own connections from the workloads', so nothing can be redirected"
		c.Fix = "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified"
	}
	e.add(c)

	c = Check{Group: "host", Name: "IPv6", State: Found}
	if fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		c.State, c.Detail, c.Cost = Missing, err.Error(), "nothing: programs have no IPv6 either"
	} else {
		unix.Close(fd)
	}
	e.add(c)

	c = Check{Group: "host", Name: "descriptors", State: Found}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		c.State, c.Detail = Unknown, err.Error()
	} else if c.Detail = fmt.Sprintf("hard limit %d", lim.Max); lim.Max < minDescriptors {
		c.State, c.Cost = Warning, fmt.Sprintf("about %d connections at once", lim.Max/2)
		c.Fix = "raise LimitNOFILE of the agent's unit"
	}
	e.add(c)
	e.add(clock())
}

// clock asks the kernel whether something keeps its time right (adjtimex(2)).
func clock() Check {
	c := Check{Group: "host", Name: "clock", State: Found}
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	switch {
	case err != nil:
		c.State, c.Detail = Unknown, err.Error()
	case time.Now().Year() < 2025:
		c.State, c.Detail = Broken, "the clock says "+time.Now().Format(time.DateOnly)
		c.Cost, c.Fix = "certificates cannot be valid", "set the clock"
	case state == unix.TIME_ERROR:
		c.State, c.Detail = Warning, "nothing keeps the clock synchronized"
		c.Cost = "when clocks drift apart by more than 30 s certificates are refused at their edges"
		c.Fix = "run an NTP client, such as systemd-timesyncd or chrony"
	}
	return c
}

// owners names other programs at the cgroup root: they see connections too, and some rewrite them.
func (e *examination) owners() {
	root, err := bpf.CgroupRoot()
	if err != nil {
		return
	}
	c := Check{Group: "network", Name: "other BPF programs", State: Found, Detail: "none at the cgroup root"}
	owners, err := bpf.Owners(root)
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

// firewall looks for a packet filter that closes the tunnel's port.
func (e *examination) firewall() {
	c := Check{Group: "network", Name: "firewall before port 15008", State: Found, Detail: "none that closes it"}
	self, err := netns.Self()
	if err == nil {
		defer self.Close()
		var text string
		if text, err = rulesOf(e.ctx); err == nil && closes(text) {
			c.State, c.Detail = Warning, "incoming connections are dropped or rejected by default, and no rule names port 15008"
			c.Cost = "other hosts' agents cannot reach this one"
			c.Fix = "allow TCP port 15008 from the hosts of your mesh, such as: nft add rule inet filter input tcp dport 15008 accept"
		}
	}
	if err != nil {
		c.State, c.Detail = Unknown, err.Error()
	}
	e.add(c)
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
