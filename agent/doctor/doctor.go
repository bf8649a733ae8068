// Package doctor looks at a host and says what the agent can do there: each
// capability found or missing, what its absence costs, and what is used instead.
// It changes nothing, and it needs no running agent.
//
// The invariant: an answer is yes, no, or could not tell, and the three are never mixed up.
package doctor

import (
	"context"
	"fmt"

	"ringfence.dev/bpf"
)

// State is the outcome of one check.
type State string

const (
	Found   State = "found"
	Missing State = "missing" // with a cost, and a fallback where there is one
	Unknown State = "could not tell"
	Warning State = "warning" // it works, and the operator should know this
	Broken  State = "broken"  // protection is impossible until it is mended
)

// Check is one thing looked at.
type Check struct {
	Group    string `json:"group"` // kernel, host, network or bypass
	Name     string `json:"name"`
	State    State  `json:"state"`
	Detail   string `json:"detail,omitempty"`
	Cost     string `json:"cost,omitempty"`     // what is lost
	Fallback string `json:"fallback,omitempty"` // what is used instead
	Fix      string `json:"fix,omitempty"`      // what the operator can do
}

// Report is the whole examination.
type Report struct {
	// OK is false when something is broken: the agent cannot protect this host as it is.
	OK bool `json:"ok"`
	// Capture is the back end an agent with these settings would use, or "none".
	Capture string  `json:"capture"`
	Checks  []Check `json:"checks"`
}

// Options say for which settings to look.
type Options struct {
	// MetricsListen and ReadinessListen are checked for clashes, unless empty.
	MetricsListen, ReadinessListen string
	// Capture is the back end asked for in the settings, or auto.
	Capture string
	// OnlyWatch says that no scope of the settings is in another mode than watch,
	// which needs nothing of the kernel.
	OnlyWatch bool
	// AgentPID is the running agent, whose ports are no clash; zero for none.
	AgentPID int
}

// Run looks at the host. It returns within ctx or a few seconds.
func Run(ctx context.Context, o Options) Report { return examine(ctx, o, thisHost()) }

func examine(ctx context.Context, o Options, h host) Report {
	e := &examination{ctx: ctx, options: o, host: h}
	e.privilege()
	e.kernel()
	e.iptables()
	e.cgroups()
	e.ipv6()
	e.descriptors()
	e.clock()
	e.ports()
	e.firewall()
	e.owners()
	e.bypass()
	r := Report{OK: true, Capture: e.capture(), Checks: e.checks}
	if r.Capture == "none" {
		r.OK = false
	}
	for _, c := range r.Checks {
		if c.State == Broken {
			r.OK = false
		}
	}
	return r
}

type examination struct {
	ctx     context.Context
	options Options
	host    host
	checks  []Check

	root   bool
	leaf   bool // cgroup v2 is there
	ebpf   bool // all that the eBPF back end requires is there
	packet bool // iptables works
}

func (e *examination) add(c Check) { e.checks = append(e.checks, c) }

// kernel reports each feature of the kernel that capture uses.
func (e *examination) kernel() {
	e.ebpf = true
	for _, f := range e.host.probe() {
		c := Check{Group: "kernel", Name: f.Name, State: Found}
		switch f.Answer {
		case bpf.No:
			c.State, c.Cost, c.Fallback = Missing, f.Cost, f.Fallback
			c.Detail = fmt.Sprintf("Linux %s and later have it", f.MinKernel)
		case bpf.Unknown:
			c.State, c.Cost, c.Fallback, c.Detail = Unknown, f.Cost, f.Fallback, f.Err
		}
		if f.Required && f.Answer != bpf.Yes {
			e.ebpf = false
		}
		e.add(c)
	}
}

// capture says which back end an agent would use. Nothing can be redirected
// without a cgroup of the agent's own.
func (e *examination) capture() string {
	hooks, rules := e.ebpf && e.root && e.leaf, e.packet && e.root && e.leaf
	switch want := e.options.Capture; {
	case want == "observe":
		return "observe"
	case want == "iptables" && rules, want == "ebpf" && hooks:
		return want
	case want == "iptables", want == "ebpf":
		return "none"
	case hooks:
		return "ebpf"
	case e.options.OnlyWatch:
		return "observe"
	case rules:
		return "iptables"
	default:
		return "none"
	}
}
