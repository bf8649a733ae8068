// Package capture declares what a capture back end does: redirect the
// connections of a scope's workloads to the agent's listeners, and tell where
// each one was going and who opened it. The back ends are in the packages
// beside this one; which is used is decided by probing, never by kernel version.
//
// The invariant: the loop guard is the agent's own cgroup leaf or its own
// sockets, never a mark, uid or port that somebody else can take on.
package capture

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"ringfence.dev/attest/workload"
	"ringfence.dev/cni/netns"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
)

// Ports of the agent inside each scope, the ones HBONE peers expect.
const (
	OutboundPort = 15001
	InboundPort  = 15006
	TunnelPort   = 15008
)

var (
	// ErrNoOrigin reports a connection the back end did not redirect: one dialled
	// straight to the agent's listener, or whose note was evicted.
	ErrNoOrigin = errors.New("capture: connection was not redirected")
	// ErrNoScope reports a scope name that the back end does not have.
	ErrNoScope = errors.New("capture: no such scope")
)

// Loopback says what happens to traffic between processes of one host over loopback.
type Loopback string

const (
	LoopbackEnforce Loopback = "enforce" // captured and decided like any other
	LoopbackObserve Loopback = "observe" // recorded without a redirect; the default
	LoopbackIgnore  Loopback = "ignore"
)

// OnAgentDown says what becomes of an enforcing scope whose agent is dead or hung.
type OnAgentDown string

const (
	DownClosed OnAgentDown = "closed" // connections are refused; the default
	DownOpen   OnAgentDown = "open"
)

// Scope is one network namespace to capture in.
type Scope struct {
	Name string
	NS   *netns.Handle
	Mode authz.Mode
	// Host marks the host's own namespace, where Cgroups decides who is covered.
	Host bool
	// Cgroups is the host scope's table at the moment it is added; see Backend.SetCgroups.
	Cgroups     []Cgroup
	Loopback    Loopback
	OnAgentDown OnAgentDown
	// Sources gives, per address family in use, the address that the workload
	// would see as its own on a connection leaving the namespace.
	Source4, Source6 netip.Addr
	// Listeners are the descriptors of the listening sockets the agent opened in
	// the namespace, owned by the caller. Empty in watch mode.
	Outbound, Inbound []int
}

// Cgroup says whether the processes of one cgroup of a host scope are covered.
type Cgroup struct {
	// ID is the cgroup v2 directory's inode number, Path its path below the cgroup v2 root.
	ID      uint64
	Path    string
	Covered bool
	// Below says that a cgroup that is made below this one later may be covered.
	// Rules that take a cgroup with all below it then capture this one too, and
	// the agent lets the processes that are directly in it pass.
	Below bool
}

// Event is one connection seen, redirected or not.
type Event struct {
	Time      time.Time
	Flow      flow.Flow
	Kind      EventKind
	Comm      string // the caller's thread name, at most 15 bytes
	Protocol  uint8  // IPPROTO number
	Bypassing bool   // seen, but the scope's rules leave it alone (kernel socket, excepted cgroup, no route)
	Reason    string // why, in a word or two; empty where the back end does not tell
	// ByPolicy marks a Refused that repeats what policy had decided for the same
	// caller and destination; the others are for want of an agent, a route or memory.
	ByPolicy bool
}

// EventKind says what was seen.
type EventKind uint8

const (
	Connected EventKind = iota // an outbound connect, recorded
	Accepted                   // an inbound connection, recorded
	Listening                  // a port was opened
	Closed                     // a port was closed
	Refused                    // the hook refused a connect by itself
	Bypass                     // sock_create or bind was refused in an enforcing scope
)

// Table is the fill of one kernel table, for status and leak tests.
type Table struct {
	Name    string `json:"name"`
	Entries int    `json:"entries"`
	Max     int    `json:"max"`
}

// Backend redirects connections. Its methods are safe for concurrent use.
type Backend interface {
	// Name is "ebpf", "iptables" or "observe".
	Name() string
	// Add makes a scope live in one step: on error nothing of it is left behind.
	Add(ctx context.Context, s Scope) error
	// SetMode changes a live scope's mode and, leaving or entering watch, its listeners.
	SetMode(ctx context.Context, s Scope) error
	// SetCgroups replaces a host scope's cgroup table. A cgroup in neither list is
	// captured, and the agent classifies it at the first connection.
	SetCgroups(scope string, cgroups []Cgroup) error
	// Remove undoes Add. Removing a scope that is not there is no error.
	Remove(ctx context.Context, scope string) error
	// Origin, BeforeConnect and Refused are as in proxy.Network, for one scope.
	Origin(scope string, d flow.Direction, fd int, local, remote netip.AddrPort) (flow.Flow, error)
	BeforeConnect(scope string, fd int, to, client netip.AddrPort, f flow.Flow) error
	Refused(scope string, f flow.Flow, who workload.Identity)
	// PolicyChanged forgets every refusal that was pushed down by Refused.
	PolicyChanged()
	// Run delivers events until ctx ends. Events are dropped, and counted, rather
	// than blocking the kernel side.
	Run(ctx context.Context, event func(Event)) error
	// Verify compares what the kernel has with what the back end installed, and
	// names each difference; an empty list means the scope is covered.
	Verify(scope string) []string
	// Tables tells the fill of the back end's kernel tables.
	Tables() []Table
	// Close lets go. With detach, all that was installed is undone; without, pinned
	// state goes on capturing for the next agent.
	Close(detach bool) error
}
