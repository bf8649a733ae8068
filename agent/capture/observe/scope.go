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
	destroyed *destroyEvents // nil where the kernel has none
	lost      atomic.Uint64

	// mu held means that a sample's result is whole.
	mu        sync.Mutex
	seen      map[uint64]struct{}         // cookies of the latest sample; guarded by mu
	before    map[uint64]struct{}         // and of the one before; guarded by mu
	ports     map[netip.AddrPort]struct{} // listening addresses told already; guarded by mu
	listening []sockdiag.Socket           // of the latest sample; guarded by mu
	covered   map[uint64]bool             // by cgroup id; guarded by mu
	err       error                       // of the latest sample; guarded by mu
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
	if err == nil {
		var open []sockdiag.Socket
		if open, err = sc.conn.Connections(ctx); err == nil {
			for _, e := range sc.compare(listening, open, ended, who) {
				event(e)
			}
		}
	}
	sc.mu.Lock()
	sc.err = err
	sc.mu.Unlock()
}

func (sc *scope) compare(listening, open, ended []sockdiag.Socket, who *finder) (events []capture.Event) {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	now := time.Now()
	events = sc.comparePorts(listening, now, who)
	seen := make(map[uint64]struct{}, len(open))
	for _, s := range slices.Concat(ended, open) {
		_, told := sc.seen[s.Cookie]
		_, before := sc.before[s.Cookie]
		_, twice := seen[s.Cookie]
		if !told && !before && !twice {
			events = sc.tell(events, s, now, who)
		}
		seen[s.Cookie] = struct{}{}
	}
	// One round longer than the dump shows it: a socket's destroy event may come
	// after the first dump without it.
	sc.before, sc.seen = sc.seen, seen
	return events
}

func (sc *scope) comparePorts(listening []sockdiag.Socket, now time.Time, who *finder) (events []capture.Event) {
	ports := make(map[netip.AddrPort]struct{}, len(listening))
	for _, s := range listening {
		if _, twice := ports[s.Source]; twice {
			continue
		}
		ports[s.Source] = struct{}{}
		if _, told := sc.ports[s.Source]; !told {
			evidence, comm := who.find(s)
			evidence.Source = workload.SourceListener
			f := flow.Flow{Scope: sc.name, Direction: flow.Inbound, Destination: s.Source, Caller: evidence}
			events = append(events, capture.Event{Time: now, Kind: capture.Listening, Flow: f, Comm: comm, Protocol: tcp})
		}
	}
	for at := range sc.ports {
		if _, still := ports[at]; !still {
			f := flow.Flow{Scope: sc.name, Direction: flow.Inbound, Destination: at}
			events = append(events, capture.Event{Time: now, Kind: capture.Closed, Flow: f, Protocol: tcp})
		}
	}
	sc.ports, sc.listening = ports, listening
	return events
}

// tell makes the event of one connected socket. Its workload, the one at this
// end, is the event's Caller in both directions.
func (sc *scope) tell(events []capture.Event, s sockdiag.Socket, now time.Time, who *finder) []capture.Event {
	if !s.Destination.IsValid() || s.Destination.Port() == 0 || sc.loopback == capture.LoopbackIgnore && onHost(s) {
		return events
	}
	e := capture.Event{Time: now, Kind: capture.Connected, Protocol: tcp}
	e.Flow = flow.Flow{Scope: sc.name, Source: s.Source, Destination: s.Destination, Device: s.Device}
	if sc.accepts(s.Source) {
		e.Kind, e.Flow.Direction = capture.Accepted, flow.Inbound
		e.Flow.Source, e.Flow.Destination = s.Destination, s.Source
	}
	e.Flow.Caller, e.Comm = who.find(s)
	covered, known := sc.covered[s.CgroupID]
	// An open socket without inode belongs to the kernel itself: never ours to touch.
	e.Bypassing = known && !covered || s.Inode == 0 && s.State == sockdiag.Established
	return append(events, e)
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
