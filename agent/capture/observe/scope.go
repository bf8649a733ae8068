package observe

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy/flow"
)

// tcp is the protocol number of every event.
const tcp = 6

// scope is one watched namespace.
type scope struct {
	// Set by newScope, then read-only.
	name      string
	loopback  capture.Loopback
	conn      *sockdiag.Conn
	destroyed *destroyEvents // nil where the kernel has none, and for onlyLoopback
	lost      atomic.Uint64
	// onlyLoopback leaves out ports, what leaves the namespace unless the kernel itself
	// opened it, and all that has an end in the cgroup except.
	onlyLoopback bool
	except       uint64

	// mu held means that a sample's result is whole.
	mu      sync.Mutex
	seen    map[uint64]struct{}         // cookies of the latest sample; guarded by mu
	before  map[uint64]struct{}         // and of the one before; guarded by mu
	ports   map[netip.AddrPort]struct{} // listening addresses told already; guarded by mu
	covered map[uint64]bool             // by cgroup id; guarded by mu
	err     error                       // of the latest sample; guarded by mu
}

func newScope(s capture.Scope) (*scope, error) {
	conn, err := sockdiag.Open(s.NS)
	if err != nil {
		return nil, err
	}
	sc := &scope{name: s.Name, loopback: s.Loopback, conn: conn, seen: map[uint64]struct{}{}, ports: map[netip.AddrPort]struct{}{}}
	// Their absence is told by Verify and costs only the shortest connections.
	sc.destroyed, _ = openDestroyEvents(s.NS, &sc.lost)
	return sc, nil
}

func newLoopbackScope(s capture.Scope, except uint64) (*scope, error) {
	conn, err := sockdiag.Open(s.NS)
	if err != nil {
		return nil, err
	}
	return &scope{
		name: s.Name, loopback: s.Loopback, conn: conn, onlyLoopback: true, except: except,
		seen: map[uint64]struct{}{}, ports: map[netip.AddrPort]struct{}{},
	}, nil
}

func (sc *scope) close() {
	sc.conn.Close()
	if sc.destroyed != nil {
		sc.destroyed.close()
	}
}

func (sc *scope) setCgroups(table []capture.Cgroup) {
	covered := make(map[uint64]bool, len(table))
	for _, c := range table {
		covered[c.ID] = c.Covered
	}
	sc.mu.Lock()
	sc.covered = covered
	sc.mu.Unlock()
}

// sample compares the namespace's sockets with those of the sample before.
func (sc *scope) sample(ctx context.Context, who *finder, event func(capture.Event)) {
	// Ended sockets first: one that is also in the dump was alive, and is told from there.
	var ended []sockdiag.Socket
	if sc.destroyed != nil {
		ended = sc.destroyed.take()
	}
	listening, err := sc.conn.Listeners(ctx)
	var open []sockdiag.Socket
	if err == nil {
		open, err = sc.conn.Connections(ctx)
	}
	if err == nil {
		if sc.onlyLoopback {
			open = sc.loops(open)
		}
		for _, e := range sc.compare(ctx, listening, slices.Concat(ended, open), who) {
			event(e)
		}
	}
	sc.mu.Lock()
	sc.err = err
	sc.mu.Unlock()
}

// loops keeps connections between two programs of the namespace, and those of the
// kernel itself. One of the agent's own with a program is the second half of one
// that was captured.
func (sc *scope) loops(open []sockdiag.Socket) []sockdiag.Socket {
	type ends struct{ from, to netip.AddrPort }
	agents := map[ends]bool{}
	for _, s := range open {
		if s.CgroupID == sc.except && sc.except != 0 {
			agents[ends{s.Source, s.Destination}] = true
		}
	}
	return slices.DeleteFunc(open, func(s sockdiag.Socket) bool {
		return !onHost(s) && !kernels(s) || agents[ends{s.Source, s.Destination}] || agents[ends{s.Destination, s.Source}]
	})
}

func (sc *scope) compare(ctx context.Context, listening, sockets []sockdiag.Socket, who *finder) []capture.Event {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	opened, closed := sc.comparePortsLocked(listening)
	fresh := sc.compareSocketsLocked(sockets) // after the ports, which tell who accepts
	owners := who.find(ctx, slices.Concat(opened, fresh))
	now := time.Now()
	var events []capture.Event
	for _, s := range opened {
		o := owners[s.Inode]
		evidence := o.evidence(s)
		evidence.Source = workload.SourceListener
		f := flow.Flow{Scope: sc.name, Direction: flow.Inbound, Destination: s.Source, Caller: evidence}
		events = append(events, capture.Event{Time: now, Kind: capture.Listening, Flow: f, Comm: o.comm, Protocol: tcp})
	}
	for _, at := range closed {
		f := flow.Flow{Scope: sc.name, Direction: flow.Inbound, Destination: at}
		events = append(events, capture.Event{Time: now, Kind: capture.Closed, Flow: f, Protocol: tcp})
	}
	for _, s := range fresh {
		events = append(events, sc.eventLocked(s, owners[s.Inode], now))
	}
	return events
}

// compareSocketsLocked returns the sockets that are to be told.
func (sc *scope) compareSocketsLocked(sockets []sockdiag.Socket) (fresh []sockdiag.Socket) {
	seen := make(map[uint64]struct{}, len(sockets))
	for _, s := range sockets {
		_, told := sc.seen[s.Cookie]
		_, before := sc.before[s.Cookie]
		_, twice := seen[s.Cookie]
		if !told && !before && !twice && sc.matters(s) {
			fresh = append(fresh, s)
		}
		seen[s.Cookie] = struct{}{}
	}
	// One round longer than the dump shows it: a socket's destroy event may come
	// after the first dump without it.
	sc.before, sc.seen = sc.seen, seen
	return fresh
}

func (sc *scope) matters(s sockdiag.Socket) bool {
	if sc.onlyLoopback && !onHost(s) && sc.accepts(s.Source) {
		return false // not the kernel's, only not yet accepted by its program
	}
	return s.Destination.IsValid() && s.Destination.Port() != 0 && (sc.loopback != capture.LoopbackIgnore || !onHost(s))
}

// kernels reports an open socket without inode: it belongs to the kernel itself, and
// is never ours to touch.
func kernels(s sockdiag.Socket) bool { return s.Inode == 0 && s.State == sockdiag.Established }

// comparePortsLocked returns the listening sockets of ports not told yet, and the
// ports that are closed by now.
func (sc *scope) comparePortsLocked(listening []sockdiag.Socket) (opened []sockdiag.Socket, closed []netip.AddrPort) {
	ports := make(map[netip.AddrPort]struct{}, len(listening))
	for _, s := range listening {
		_, twice := ports[s.Source]
		_, told := sc.ports[s.Source]
		ports[s.Source] = struct{}{}
		if !twice && !told && !sc.onlyLoopback {
			opened = append(opened, s)
		}
	}
	for at := range sc.ports {
		if _, still := ports[at]; !still && !sc.onlyLoopback {
			closed = append(closed, at)
		}
	}
	sc.ports = ports
	return opened, closed
}

// eventLocked makes the event of one connected socket. Its workload, the one at
// this end, is the event's Caller in both directions.
func (sc *scope) eventLocked(s sockdiag.Socket, o owner, now time.Time) capture.Event {
	e := capture.Event{Time: now, Kind: capture.Connected, Protocol: tcp, Comm: o.comm}
	e.Flow = flow.Flow{Scope: sc.name, Source: s.Source, Destination: s.Destination, Device: s.Device, Caller: o.evidence(s)}
	if sc.accepts(s.Source) {
		e.Kind, e.Flow.Direction = capture.Accepted, flow.Inbound
		e.Flow.Source, e.Flow.Destination = s.Destination, s.Source
	}
	covered, known := sc.covered[s.CgroupID]
	e.Bypassing = known && !covered || kernels(s)
	return e
}

// accepts reports whether a local address is one that somebody listens on.
func (sc *scope) accepts(local netip.AddrPort) bool {
	if _, ok := sc.ports[local]; ok {
		return true
	}
	for _, wild := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		// An IPv6 wildcard listener usually takes IPv4 connections as well.
		if _, ok := sc.ports[netip.AddrPortFrom(wild, local.Port())]; ok && (local.Addr().Is4() || wild.Is6()) {
			return true
		}
	}
	return false
}

// onHost reports whether a connection never leaves the namespace.
func onHost(s sockdiag.Socket) bool {
	return s.Destination.Addr().IsLoopback() || s.Source.Addr() == s.Destination.Addr()
}

// trimComm drops the newline of /proc/PID/comm.
func trimComm(text []byte) string { return strings.TrimSuffix(string(text), "\n") }
