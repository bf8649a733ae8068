package iptables

import (
	"cmp"
	"context"
	"net/netip"
	"slices"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/policy/authz"
)

// followsPortsLocked reports whether the rules depend on who listens where: in a
// scope of which a part is left alone. Elsewhere the rules ask the kernel's own table.
func (sc *scope) followsPortsLocked() bool {
	return !sc.closed && sc.fw != nil && sc.s.Host && sc.s.Mode != authz.Watch && len(sc.table) > 0
}

// followPortsLocked looks who listens, and writes the rules if that made a
// difference.
func (sc *scope) followPortsLocked(ctx context.Context) error {
	if diag := sc.diag.Load(); diag != nil && sc.followsPortsLocked() {
		listening, err := diag.Listeners(ctx)
		if err != nil {
			return err
		}
		sc.listening = listening
	}
	sc.portsLocked(ctx)
	return sc.refreshLocked(ctx)
}

// followNewPortsLocked is followPortsLocked for somebody who asks all the time: when
// the same sockets listen as before, nothing is done.
func (sc *scope) followNewPortsLocked(ctx context.Context) error {
	diag := sc.diag.Load()
	if diag == nil {
		return capture.ErrNoScope
	}
	listening, err := diag.Listeners(ctx)
	if err != nil {
		return err
	}
	if sc.failed == nil && sameSockets(sc.listening, listening) {
		return nil
	}
	sc.listening = listening
	sc.portsLocked(ctx)
	return sc.refreshLocked(ctx)
}

func sameSockets(a, b []sockdiag.Socket) bool {
	if len(a) != len(b) {
		return false
	}
	known := make(map[uint64]bool, len(a))
	for _, s := range a {
		known[s.Cookie] = true
	}
	return !slices.ContainsFunc(b, func(s sockdiag.Socket) bool { return !known[s.Cookie] })
}

// portsLocked works out which listening addresses of a host scope are not
// covered. Elsewhere everything that listens is, except for the agent itself.
func (sc *scope) portsLocked(ctx context.Context) {
	covers := sc.coverageLocked(ctx)
	covered := map[port]bool{} // keyed with covered false
	for _, l := range sc.listening {
		if agentPort(l.Source.Port()) {
			continue // the rules know them
		}
		for _, at := range addresses(l) {
			at.port = l.Source.Port()
			// Shared by several, one of them covered: covered.
			covered[at] = covered[at] || covers(l)
		}
	}
	sc.spec.ports = exceptions(covered)
}

// coverageLocked returns what says whether a listening socket is covered. Whatever
// cannot be told is: the agent finds out at the connection.
func (sc *scope) coverageLocked(ctx context.Context) func(sockdiag.Socket) bool {
	exact, nearby := map[string]bool{}, map[string]bool{}
	if sc.s.Host {
		for _, c := range sc.aliveLocked() {
			exact[clean(c.Path)], nearby[clean(c.Path)] = c.Covered, takesBelow(c)
		}
	}
	var homes map[uint64]string // of sockets whose cgroup the kernel does not tell
	if sc.s.Host && len(exact) > 0 {
		homes = sc.b.homes(ctx, sc.listening)
	}
	verdicts := map[uint64]bool{} // by cgroup, most of which have many sockets
	return func(l sockdiag.Socket) bool {
		switch {
		case l.CgroupID == sc.b.leafID:
			return false
		case !sc.s.Host || len(exact) == 0:
			return true
		case l.CgroupID == 0:
			path, ok := homes[l.Inode]
			return !ok || path != sc.b.leaf && coversPath(exact, nearby, path)
		}
		verdict, ok := verdicts[l.CgroupID]
		if !ok {
			path, err := sc.b.tree.Path(l.CgroupID)
			verdict = err != nil || coversPath(exact, nearby, path)
			verdicts[l.CgroupID] = verdict
		}
		return verdict
	}
}

func coversPath(exact, nearby map[string]bool, path string) bool {
	if own, ok := exact[path]; ok {
		return own
	}
	return inherited(nearby, path)
}

// homes finds the cgroups of sockets that do not tell theirs (before Linux 5.9):
// those of the processes that hold them, if they all are in one. A kernel that
// tells costs nothing here.
func (b *Backend) homes(ctx context.Context, sockets []sockdiag.Socket) map[uint64]string {
	var inodes []uint64
	for _, s := range sockets {
		if s.CgroupID == 0 && s.Inode != 0 {
			inodes = append(inodes, s.Inode)
		}
	}
	homes := map[uint64]string{}
	if len(inodes) == 0 {
		return homes
	}
	found, _ := b.procs.FindAll(ctx, inodes, nil) // what is not found counts as covered
	for inode, holders := range found {
		for i, h := range holders {
			image, err := b.procs.Read(h.PID)
			if err != nil || !image.Process.Same(h.Process) || i > 0 && homes[inode] != image.Cgroups.V2 {
				delete(homes, inode)
				break
			}
			homes[inode] = image.Cgroups.V2
		}
	}
	return homes
}

// exceptions keeps the addresses that are not covered, and the covered ones whose
// port has a wildcard listener that is not. Specific addresses come first.
func exceptions(covered map[port]bool) (ports []port) {
	for at, yes := range covered {
		wild := port{addr: unspecified(at.addr), port: at.port}
		if wildCovered, ok := covered[wild]; !yes || at != wild && ok && !wildCovered {
			at.covered = yes
			ports = append(ports, at)
		}
	}
	slices.SortFunc(ports, func(a, b port) int {
		return cmp.Or(btoi(a.addr.IsUnspecified())-btoi(b.addr.IsUnspecified()), a.addr.Compare(b.addr), cmp.Compare(a.port, b.port))
	})
	return ports
}

// addresses are the destinations that a listener takes: an IPv6 wildcard that is
// not limited to IPv6 takes IPv4 ones too.
func addresses(l sockdiag.Socket) []port {
	at := []port{{addr: l.Source.Addr().WithZone("")}}
	if l.Source.Addr() == netip.IPv6Unspecified() && !l.V6Only {
		at = append(at, port{addr: netip.IPv4Unspecified()})
	}
	return at
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
