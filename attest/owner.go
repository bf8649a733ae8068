package attest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
	"ringfence.dev/cni/netns"
)

const (
	// ownerAge is how long holders are believed while the listening sockets and
	// one holder of each stay: a descriptor may be passed on without a trace.
	ownerAge = time.Minute
	// failureAge is how long a failure is repeated without looking again, so that
	// a peer cannot make the node walk all descriptors at each connection.
	failureAge = time.Second
	// quietAge is how long an owner is believed without a look at the socket tables,
	// while the count of listeners that came or went stays. What that count does not
	// show: listeners that were there before it began, and the end of a holder
	// whose socket somebody else keeps open.
	quietAge = time.Second
)

type ownerKey struct {
	ns   uint64 // inode of the namespace; the cached netlink socket keeps it from being reused
	addr netip.AddrPort
}

// owner is who was found to hold an address's listening sockets.
type owner struct {
	inodes   []uint64      // of the sockets, sorted
	holders  []proc.Holder // one for each
	identity workload.Identity
	err      error
	until    time.Time
	// When it was last looked at, and the count of listener changes just before;
	// both as one value, since they are read together.
	seen atomic.Pointer[sighting]
}

type sighting struct {
	listens uint64
	at      time.Time
}

// Owner names the workload that listens on addr in the namespace: on exactly
// that address, else on the wildcard, which for IPv4 may be a dual-stack IPv6
// socket. An unspecified address in addr means any listener on the port.
//
// All processes that hold such a socket (forked workers, members of a
// SO_REUSEPORT group) must have one identity. PID 1 does not count beside
// others: it holds the sockets of services that it activates. What it holds
// alone belongs to the service that its socket unit names.
//
// Errors: [workload.ErrUnknown] when nothing listens or the holders have no
// identity, [workload.ErrAmbiguous] when they disagree, [workload.ErrGone]
// when they ended meanwhile.
func (a *Attestor) Owner(ctx context.Context, ns *netns.Handle, addr netip.AddrPort) (workload.Identity, error) {
	addr = netip.AddrPortFrom(addr.Addr().Unmap().WithZone(""), addr.Port())
	id, err := a.owner(ctx, ns, addr)
	if err != nil {
		return workload.Identity{}, fmt.Errorf("owner of %s: %w", addr, err)
	}
	return id, nil
}

func (a *Attestor) owner(ctx context.Context, ns *netns.Handle, addr netip.AddrPort) (workload.Identity, error) {
	key := ownerKey{ns.Inode(), addr}
	o, known := a.owners.get(key)
	if known && o.quiet(a) {
		return o.identity, o.err
	}
	now := a.sighting()
	sockets, err := a.listeners(ctx, ns, addr)
	if err != nil {
		return workload.Identity{}, err
	}
	if known && o.stands(a, sockets) {
		o.seen.Store(now)
		return o.identity, o.err
	}
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return workload.Identity{}, ctx.Err()
	}
	if o, ok := a.owners.get(key); ok && o.stands(a, sockets) { // found while we waited
		return o.identity, o.err
	}
	o = a.find(ctx, sockets, addr)
	o.seen.Store(now)
	// What only came in between is not repeated to the next caller.
	if ctx.Err() == nil && !errors.Is(o.err, workload.ErrGone) {
		a.owners.put(key, o)
	}
	return o.identity, o.err
}

// sighting is made before looking, so that what changes meanwhile is seen the next time.
func (a *Attestor) sighting() *sighting {
	if a.listens == nil {
		return nil
	}
	return &sighting{a.listens(), time.Now()}
}

// quiet reports whether nothing can have changed since the owner was looked at.
func (o *owner) quiet(a *Attestor) bool {
	s := o.seen.Load()
	return s != nil && s.listens == a.listens() && time.Since(s.at) < a.quietFor && time.Now().Before(o.until)
}

// stands reports whether what was found still holds for these sockets.
func (o *owner) stands(a *Attestor, sockets []sockdiag.Socket) bool {
	if !slices.Equal(o.inodes, inodes(sockets)) || time.Now().After(o.until) {
		return false
	}
	for i, h := range o.holders {
		if !a.proc.Holds(h, o.inodes[i]) {
			return false
		}
	}
	return true
}

func inodes(sockets []sockdiag.Socket) []uint64 {
	out := make([]uint64, len(sockets))
	for i, s := range sockets {
		out[i] = s.Inode
	}
	slices.Sort(out)
	return out
}

// listeners returns the sockets that could take a connection to addr.
func (a *Attestor) listeners(ctx context.Context, ns *netns.Handle, addr netip.AddrPort) ([]sockdiag.Socket, error) {
	var sockets []sockdiag.Socket
	err := a.ask(ns, func(c *sockdiag.Conn) (err error) {
		sockets, err = c.ListenersOn(ctx, addr.Port())
		return err
	})
	if err == nil {
		sockets = taking(sockets, addr.Addr())
	}
	if err == nil && len(sockets) == 0 {
		err = fmt.Errorf("nothing listens there: %w", workload.ErrUnknown)
	}
	if errors.Is(err, sockdiag.ErrNotFound) {
		err = fmt.Errorf("%w: %w", err, workload.ErrUnknown)
	}
	return sockets, err
}

// taking selects as the kernel's listener look-up does (__inet_lookup_listener
// in net/ipv4/inet_hashtables.c): the exact address before the wildcard. Sockets
// bound to a device take connections from that device only, and which one a
// connection comes from is not known here: they are possible beside others.
func taking(sockets []sockdiag.Socket, ip netip.Addr) []sockdiag.Socket {
	if !ip.IsValid() || ip.IsUnspecified() {
		return sockets
	}
	var out []sockdiag.Socket
	settled := false // an exact socket takes connections from every device
	for _, s := range sockets {
		if s.Source.Addr() == ip {
			out = append(out, s)
			settled = settled || s.Device == 0
		}
	}
	for _, s := range sockets {
		if !settled && wildcard(s, ip) {
			out = append(out, s)
		}
	}
	return out
}

func wildcard(s sockdiag.Socket, ip netip.Addr) bool {
	bound := s.Source.Addr()
	if !bound.IsUnspecified() {
		return false
	}
	return bound.Is4() == ip.Is4() || s.Family == unix.AF_INET6 && ip.Is4() && !s.V6Only
}

// find walks descriptor tables for the holders of all sockets and compares
// their identities.
func (a *Attestor) find(ctx context.Context, sockets []sockdiag.Socket, addr netip.AddrPort) *owner {
	o := &owner{inodes: inodes(sockets), until: time.Now().Add(ownerAge)}
	if err := o.compare(ctx, a, addr); err != nil {
		// A failure is not tied to holders, which may be none.
		return &owner{inodes: o.inodes, err: err, until: time.Now().Add(failureAge)}
	}
	return o
}

func (o *owner) compare(ctx context.Context, a *Attestor, addr netip.AddrPort) error {
	if o.inodes[0] == 0 {
		return fmt.Errorf("a socket there is the kernel's own: %w", workload.ErrUnknown)
	}
	found, err := a.proc.FindAll(ctx, o.inodes, nil)
	if err != nil {
		return err
	}
	for i, inode := range o.inodes {
		holder, id, err := a.holder(ctx, inode, found[inode], addr)
		switch {
		case err != nil:
			return err
		case i > 0 && id.ID != o.identity.ID:
			return disagree(o.identity, id)
		case holder.PID == 1:
			o.until = time.Now().Add(failureAge) // soon the service has it too
		}
		o.holders, o.identity = append(o.holders, holder), id
	}
	return nil
}

func disagree(a, b workload.Identity) error {
	return fmt.Errorf("held by %s (pid %d) and %s (pid %d): %w", a.ID, a.Evidence.PID, b.ID, b.Evidence.PID, workload.ErrAmbiguous)
}

// holder identifies the processes that hold one socket, and returns one of them.
func (a *Attestor) holder(ctx context.Context, inode uint64, all []proc.Holder, addr netip.AddrPort) (proc.Holder, workload.Identity, error) {
	others := slices.DeleteFunc(slices.Clone(all), func(h proc.Holder) bool { return h.PID == 1 })
	switch {
	case len(all) == 0:
		return proc.Holder{}, workload.Identity{}, fmt.Errorf("no process has a descriptor of socket %d: %w", inode, workload.ErrUnknown)
	case len(others) == 0:
		id, err := a.activated(ctx, all[0], addr)
		return all[0], id, err
	}
	return a.agreed(ctx, inode, others)
}

// agreed identifies holders of one socket. Those that ended, or let go of it,
// meanwhile do not count.
func (a *Attestor) agreed(ctx context.Context, inode uint64, holders []proc.Holder) (first proc.Holder, id workload.Identity, err error) {
	for _, h := range holders {
		got, err := a.identifyHolder(ctx, h)
		switch {
		case !a.proc.Holds(h, inode) && !a.threadHolds(ctx, h, inode):
			continue
		case err != nil:
			return h, workload.Identity{}, err
		case first.PID != 0 && got.ID != id.ID:
			return h, workload.Identity{}, disagree(id, got)
		case first.PID == 0:
			first, id = h, got
		}
	}
	if first.PID == 0 {
		return first, id, fmt.Errorf("the holders of socket %d ended: %w", inode, workload.ErrGone)
	}
	return first, id, nil
}

// threadHolds is for sockets that only a thread with a table of its own has.
func (a *Attestor) threadHolds(ctx context.Context, h proc.Holder, inode uint64) bool {
	found, err := a.proc.FindHolders(ctx, inode, []uint32{h.PID})
	return err == nil && len(found) > 0 && found[0].Same(h.Process)
}

func (a *Attestor) identifyHolder(ctx context.Context, h proc.Holder) (workload.Identity, error) {
	ev, err := a.evidence(h.PID)
	if err != nil {
		return workload.Identity{}, err
	}
	if !ev.Same(h.Process) {
		return workload.Identity{}, fmt.Errorf("process %d: %w", h.PID, workload.ErrGone)
	}
	return a.Identify(ctx, ev)
}

// Sole names the only workload that listens in the namespace, the calling
// process's own listeners aside. None is [workload.ErrUnknown], several are
// [workload.ErrAmbiguous].
func (a *Attestor) Sole(ctx context.Context, ns *netns.Handle) (workload.Identity, error) {
	var sockets []sockdiag.Socket
	err := a.ask(ns, func(c *sockdiag.Conn) (err error) {
		sockets, err = c.Listeners(ctx)
		return err
	})
	if err != nil {
		return workload.Identity{}, fmt.Errorf("sole listener: %w", err)
	}
	ours, err := a.proc.Sockets(a.self)
	if err != nil {
		return workload.Identity{}, fmt.Errorf("sole listener: %w", err)
	}
	var sole workload.Identity
	for _, s := range sockets {
		if slices.Contains(ours, s.Inode) {
			continue
		}
		id, err := a.Owner(ctx, ns, s.Source)
		switch {
		case err != nil:
			return workload.Identity{}, fmt.Errorf("sole listener: %w", err)
		case sole.ID.IsZero():
			sole = id
		case sole.ID != id.ID:
			return workload.Identity{}, fmt.Errorf("sole listener: %w", disagree(sole, id))
		}
	}
	if sole.ID.IsZero() {
		return sole, fmt.Errorf("sole listener: nothing listens: %w", workload.ErrUnknown)
	}
	return sole, nil
}

// ask uses the namespace's netlink socket, opening it at first use.
func (a *Attestor) ask(ns *netns.Handle, fn func(*sockdiag.Conn) error) error {
	if c, ok := a.conns.get(ns.Inode()); ok {
		// Closed means that Forget, or the bound on conns, came between.
		if err := fn(c); !errors.Is(err, sockdiag.ErrClosed) {
			return err
		}
	}
	c, err := sockdiag.Open(ns)
	if err != nil {
		return err
	}
	if old, ok := a.conns.put(ns.Inode(), c); ok {
		old.Close()
	}
	return fn(c)
}

// Forget drops what is cached about a namespace, and lets go of it. Call it
// when a scope is removed: until then its namespace is kept alive.
func (a *Attestor) Forget(ns *netns.Handle) {
	ino := ns.Inode()
	for _, c := range a.conns.removeIf(func(k uint64) bool { return k == ino }) {
		c.Close()
	}
	a.owners.removeIf(func(k ownerKey) bool { return k.ns == ino })
}
