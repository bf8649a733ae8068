package iptables

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/sockdiag"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/cni/netns"
	"ringfence.dev/policy/authz"
)

// tables are a namespace's socket tables.
type tables struct {
	*sockdiag.Conn
	ns *netns.Handle
}

// scope is one namespace with rules in it.
type scope struct {
	b    *Backend
	name string
	diag atomic.Pointer[tables] // nil until opened and after closing

	// mu held means that the rules in the kernel are those in want.
	mu         sync.Mutex
	s          capture.Scope
	fw         *fw.Namespace
	ct         conntrack
	spec       spec
	table      []capture.Cgroup
	listening  []sockdiag.Socket // that spec.ports was worked out from
	watched    watching
	want       map[fw.Family]fw.Ruleset
	wrotePorts []port // those in the rules of want
	ipv6       bool   // the namespace has IPv6
	failed     error  // of the latest attempt to write rules
	closed     bool
}

func (sc *scope) openLocked(ctx context.Context, s capture.Scope) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, sc.closeLocked(context.WithoutCancel(ctx), true))
		}
	}()
	sc.s = s
	if sc.fw, err = sc.b.tools.Open(ctx, s.NS); err != nil {
		return err
	}
	conn, err := sockdiag.Open(s.NS)
	if err != nil {
		return err
	}
	sc.diag.Store(&tables{Conn: conn, ns: s.NS})
	sc.table = slices.Clone(s.Cgroups)
	if err := sc.watchLocked(); err != nil {
		return err
	}
	sc.ipv6 = hasIPv6(s)
	sc.ct = newConntrack(s.NS)
	sc.ct.begin()
	if sc.listening, err = conn.Listeners(ctx); err != nil {
		return err
	}
	sc.portsLocked(ctx)
	if _, err := sc.forwardsLocked(ctx); err != nil {
		return err
	}
	sc.respecLocked()
	return sc.writeLocked(ctx)
}

// forwardsLocked looks which ports of a host are forwarded by the rules of
// others, and reports whether that has changed.
func (sc *scope) forwardsLocked(ctx context.Context) (changed bool, err error) {
	if !sc.s.Host {
		return false, nil
	}
	forwards := map[fw.Family][]fw.Rule{}
	for f := range sc.wantLocked() {
		if forwards[f], err = sc.fw.Forwards(ctx, f); err != nil {
			return false, err
		}
		same := slices.EqualFunc(forwards[f], sc.spec.forwards[f], func(a, b fw.Rule) bool { return slices.Equal(a, b) })
		changed = changed || !same
	}
	sc.spec.forwards = forwards
	return changed, nil
}

func (sc *scope) setModeLocked(ctx context.Context, s capture.Scope) error {
	if sc.closed {
		return capture.ErrNoScope
	}
	before := sc.s
	sc.s.Mode, sc.s.Loopback, sc.s.OnAgentDown = s.Mode, s.Loopback, s.OnAgentDown
	sc.s.Outbound, sc.s.Inbound = s.Outbound, s.Inbound
	sc.respecLocked()
	err := sc.writeLocked(ctx)
	if err == nil {
		err = sc.watchLocked()
	}
	if err == nil {
		return nil
	}
	sc.s = before
	sc.respecLocked()
	return errors.Join(err, sc.writeLocked(context.WithoutCancel(ctx)), sc.watchLocked())
}

// respecLocked derives the rules' inputs from the scope's settings and tables.
func (sc *scope) respecLocked() {
	sc.spec.leaf, sc.spec.mark = sc.b.leaf, sc.b.mark
	sc.spec.mode = sc.s.Mode
	sc.spec.loopback = sc.s.Loopback == capture.LoopbackEnforce
	sc.spec.cgroups = nil
	if sc.s.Host {
		sc.spec.cgroups = compress(sc.aliveLocked())
	}
}

// aliveLocked leaves out cgroups that are gone, or whose name another cgroup has
// by now: xt_cgroup refuses a rule with a path that does not exist, and with
// it the whole transaction.
func (sc *scope) aliveLocked() []capture.Cgroup {
	var alive []capture.Cgroup
	for _, c := range sc.table {
		// The kernel takes paths of less than 512 bytes, xt_cgroup.h.
		if id, err := sc.b.tree.ID(clean(c.Path)); err == nil && (c.ID == 0 || id == c.ID) && len(c.Path) < 511 {
			alive = append(alive, c)
		}
	}
	return alive
}

func (sc *scope) setCgroupsLocked(ctx context.Context, table []capture.Cgroup) error {
	if sc.closed {
		return capture.ErrNoScope
	}
	sc.table = slices.Clone(table)
	if sc.watched != nothing {
		if err := sc.b.watch.SetCgroups(sc.name, table); err != nil {
			return err
		}
	}
	return sc.followPortsLocked(ctx)
}

// refreshLocked writes the rules when what they depend on has changed. A cgroup
// that goes away between the look and the write fails the write: look again.
func (sc *scope) refreshLocked(ctx context.Context) (err error) {
	for range 3 {
		before := sc.spec
		sc.respecLocked()
		if sc.failed == nil && slices.Equal(before.cgroups, sc.spec.cgroups) && slices.Equal(sc.wrotePorts, sc.spec.ports) {
			return nil
		}
		if err = sc.writeLocked(ctx); err == nil || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// wantLocked is what the namespace shall hold now.
func (sc *scope) wantLocked() map[fw.Family]fw.Ruleset {
	want := map[fw.Family]fw.Ruleset{fw.IPv4: sc.spec.up(fw.IPv4)}
	if sc.ipv6 && sc.fw.Family(fw.IPv6) {
		want[fw.IPv6] = sc.spec.up(fw.IPv6)
	}
	return want
}

func (sc *scope) writeLocked(ctx context.Context) error {
	sc.want = sc.wantLocked()
	sc.failed = sc.fw.Apply(ctx, sc.want)
	if sc.failed != nil {
		return sc.failed
	}
	sc.wrotePorts = slices.Clone(sc.spec.ports)
	return sc.willLocked()
}

// willLocked tells the guard what to write when the agent is gone.
func (sc *scope) willLocked() error {
	if sc.b.guard == nil {
		return nil
	}
	if sc.s.Mode == authz.Watch {
		return sc.b.guard.forget(sc.name)
	}
	variant, _ := sc.fw.Variant()
	down := map[fw.Family]fw.Ruleset{}
	if sc.closedWhenDownLocked() {
		for f := range sc.want {
			down[f] = sc.spec.down(f)
		}
	}
	return sc.b.guard.arm(will{Scope: sc.name, NetNS: nsPath(sc.s.NS.FD()), Variant: variant, Down: down})
}

// closedWhenDownLocked reports whether the scope refuses while no agent lives.
func (sc *scope) closedWhenDownLocked() bool {
	return sc.s.Mode == authz.Enforce && sc.s.OnAgentDown != capture.DownOpen
}

func (sc *scope) closeLocked(ctx context.Context, detach bool) error {
	if sc.closed {
		return nil
	}
	var errs []error
	if sc.b.guard != nil {
		// First, or the guard would write its will over a namespace just cleaned.
		errs = append(errs, sc.b.guard.forget(sc.name))
	}
	if detach && sc.fw != nil {
		if err := sc.fw.Remove(ctx); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	sc.closed = true
	if t := sc.diag.Swap(nil); t != nil {
		errs = append(errs, t.Close())
	}
	errs = append(errs, sc.b.watch.Remove(ctx, sc.name))
	return errors.Join(errs...)
}

// hasIPv6 asks by opening a socket: a kernel started with ipv6.disable=1 has the
// sysctl files all the same.
func hasIPv6(s capture.Scope) bool {
	fd, err := s.NS.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}
