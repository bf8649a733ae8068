package ebpf

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/bpf"
	"ringfence.dev/policy/authz"
)

// scope is one live scope. Its fields are guarded by Backend.mu, except that name and cookie never change.
type scope struct {
	name    string
	cookie  uint64
	def     capture.Scope
	record  bpf.Scope // as the kernel has it
	routes  map[netip.Prefix]bpf.Route
	unknown bool // routes do not tell the whole truth
	follow  int  // netlink socket of route messages, -1 for none

	// locals are the namespace's own addresses, for the dial path; replaced whole.
	locals atomic.Pointer[map[netip.Addr]bool]
}

// Add makes a scope live. The order matters: listening ports are counted from
// the moment the namespace is in the scope table, so it enters as watch, unless
// a previous agent left it live in a stricter mode, and gets its mode last.
func (b *Backend) Add(_ context.Context, def capture.Scope) (err error) {
	if def.NS == nil || def.NS.Cookie() == 0 {
		return fmt.Errorf("scope %s: the kernel tells no cookie of its namespace", def.Name)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lookup(def.Name) != nil || b.ofNS(def.NS.Cookie()) != nil {
		return fmt.Errorf("scope %s: its name or its namespace is a live scope already", def.Name)
	}
	s := &scope{name: def.Name, cookie: def.NS.Cookie(), def: def, follow: -1, routes: map[netip.Prefix]bpf.Route{}}
	left := b.inst.Maps.RfScopes.Lookup(s.cookie, &bpf.Scope{}) == nil
	defer func() {
		if err == nil {
			return
		}
		err = fmt.Errorf("add scope %s: %w", def.Name, err)
		s.closeFollower(b.epoll)
		if !left { // a predecessor's protection is not undone by our failure
			err = errors.Join(err, b.forget(s.cookie))
		}
	}()
	if err := b.followRoutes(s); err != nil {
		return err
	}
	if !left {
		if err := b.inst.Maps.RfScopes.Put(s.cookie, &bpf.Scope{Mode: bpf.ModeWatch}); err != nil {
			return fmt.Errorf("write scope table: %w", err)
		}
	}
	if err := b.seed(s); err != nil {
		return err
	}
	if err := b.activate(s); err != nil {
		return err
	}
	b.index.Lock()
	b.byName[s.name], b.byNS[s.cookie] = s, s
	b.index.Unlock()
	return nil
}

// activate brings listeners, steering and the scope's record in line with s.def.
func (b *Backend) activate(s *scope) error {
	if s.def.Mode == authz.Watch {
		if err := b.writeRecord(s); err != nil {
			return err
		}
		b.dropListeners(s.cookie)
		return b.inst.Unsteer(s.cookie)
	}
	if err := b.heartbeat(); err != nil {
		return err
	}
	if err := b.setListeners(s); err != nil {
		return err
	}
	if err := b.inst.Steer(s.def.NS.FD(), s.cookie); err != nil {
		return err
	}
	return b.writeRecord(s)
}

func (b *Backend) writeRecord(s *scope) error {
	r, err := recordOf(s)
	if err != nil {
		return err
	}
	if err := b.inst.Maps.RfScopes.Put(s.cookie, &r); err != nil {
		return fmt.Errorf("write scope table: %w", err)
	}
	s.record = r
	return nil
}

// recordOf turns the definition into the kernel's record. Unknown words are refused, not guessed.
func recordOf(s *scope) (bpf.Scope, error) {
	r := bpf.Scope{Source4: bpf.Address(s.def.Source4), Source6: bpf.Address(s.def.Source6)}
	switch s.def.Mode {
	case authz.Watch:
		r.Mode = bpf.ModeWatch
	case authz.DryRun:
		r.Mode = bpf.ModeDryRun
	case authz.Enforce:
		r.Mode = bpf.ModeEnforce
	default:
		return r, fmt.Errorf("unknown mode %d", s.def.Mode)
	}
	switch s.def.Loopback {
	case capture.LoopbackEnforce:
		r.Flags |= bpf.FlagLoopEnforce
	case capture.LoopbackObserve, "":
		r.Flags |= bpf.FlagLoopObserve
	case capture.LoopbackIgnore:
	default:
		return r, fmt.Errorf("unknown loopback setting %q", s.def.Loopback)
	}
	switch s.def.OnAgentDown {
	case capture.DownOpen:
		r.Flags |= bpf.FlagDownOpen
	case capture.DownClosed, "":
	default:
		return r, fmt.Errorf("unknown setting %q for a dead agent", s.def.OnAgentDown)
	}
	if s.def.Host {
		r.Flags |= bpf.FlagHost
	}
	if s.unknown {
		r.Flags |= bpf.FlagRoutesUnknown
	}
	return r, nil
}

// SetMode changes a live scope to what def says; its namespace stays.
func (b *Backend) SetMode(_ context.Context, def capture.Scope) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.lookup(def.Name)
	if s == nil {
		return fmt.Errorf("set mode of %s: %w", def.Name, capture.ErrNoScope)
	}
	before := s.def
	def.NS = before.NS
	s.def = def
	if _, err := recordOf(s); err != nil {
		s.def = before
		return fmt.Errorf("set mode of %s: %w", def.Name, err)
	}
	if err := b.activate(s); err != nil {
		s.def = before
		return errors.Join(fmt.Errorf("set mode of %s: %w", def.Name, err), b.writeRecord(s))
	}
	return nil
}

// SetCgroups replaces the cgroup table of a host scope. Covered cgroups enter
// before those that left are removed, so that none is excepted by accident.
func (b *Backend) SetCgroups(name string, cgroups []capture.Cgroup) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.lookup(name)
	if s == nil {
		return fmt.Errorf("set cgroups of %s: %w", name, capture.ErrNoScope)
	}
	next := make(map[uint64]bool, len(cgroups))
	for _, c := range cgroups {
		// Named twice, covered wins.
		covered := c.Covered || next[c.ID]
		next[c.ID] = covered
		value := uint32(0)
		if covered {
			value = 1
		}
		if err := b.inst.Maps.RfCgroups.Put(bpf.CgroupKey{Netns: s.cookie, Cgroup: c.ID}, value); err != nil {
			return fmt.Errorf("set cgroups of %s: %w", name, err)
		}
	}
	return sweepTable(b.inst.Maps.RfCgroups, func(k bpf.CgroupKey) bool {
		_, keep := next[k.Cgroup]
		return k.Netns == s.cookie && !keep
	})
}

// Remove undoes Add.
func (b *Backend) Remove(_ context.Context, name string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.lookup(name)
	if s == nil {
		return nil
	}
	b.index.Lock()
	delete(b.byName, s.name)
	delete(b.byNS, s.cookie)
	b.index.Unlock()
	s.closeFollower(b.epoll)
	if err := b.forget(s.cookie); err != nil {
		return fmt.Errorf("remove scope %s: %w", name, err)
	}
	return nil
}

// Prune removes what a previous agent left live and this one has not added:
// scopes that are configured no more, and namespaces that are gone.
func (b *Backend) Prune() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	found := map[uint64]bool{}
	steered, err := b.inst.Steered()
	errs := []error{err}
	for _, c := range steered {
		found[c] = true
	}
	keys, err := keysOf[uint64](b.inst.Maps.RfScopes)
	errs = append(errs, err)
	for _, c := range keys {
		found[c] = true
	}
	for c := range found {
		if b.ofNS(c) == nil {
			b.log.Info("removing a scope that the previous agent left", "netns_cookie", c)
			errs = append(errs, b.forget(c))
		}
	}
	return errors.Join(errs...)
}

// forget removes all that the tables know of a namespace, its scope entry first.
func (b *Backend) forget(cookie uint64) error {
	m := &b.inst.Maps
	errs := []error{ignoreMissing(m.RfScopes.Delete(cookie)), b.inst.Unsteer(cookie)}
	b.dropListeners(cookie)
	return errors.Join(append(errs,
		sweepTable(m.RfCgroups, func(k bpf.CgroupKey) bool { return k.Netns == cookie }),
		sweepTable(m.RfPorts, func(k bpf.PortKey) bool { return k.Netns == cookie }),
		sweepTable(m.RfNotes, func(k bpf.ConnKey) bool { return k.Netns == cookie }),
		sweepTable(m.RfExempt, func(k bpf.ConnKey) bool { return k.Netns == cookie }),
		sweepTable(m.RfDenies, func(k bpf.DenyKey) bool { return k.Netns == cookie }),
		sweepTable(m.RfRoutes, func(k bpf.RouteKey) bool {
			return k.NetnsHi == uint32(cookie>>32) && k.NetnsLo == uint32(cookie)
		}),
	)...)
}

// setListeners shows the agent's listening sockets to the programs: the inbound ones
// as targets of steering, all of them as not the workload's.
func (b *Backend) setListeners(s *scope) error {
	for _, fd := range append(append([]int{}, s.def.Outbound...), s.def.Inbound...) {
		if err := b.inst.Maps.RfOwn.Put(uint32(fd), uint32(1)); err != nil {
			return fmt.Errorf("mark listener: %w", err)
		}
	}
	for _, fd := range s.def.Inbound {
		families, err := familiesOf(fd)
		if err != nil {
			return fmt.Errorf("inbound listener: %w", err)
		}
		for _, family := range families {
			key := bpf.ListenerKey{Netns: s.cookie, Family: family}
			if err := b.inst.Maps.RfListeners.Put(key, uint64(fd)); err != nil {
				return fmt.Errorf("show inbound listener (it must be a plain TCP socket, not MPTCP): %w", err)
			}
		}
	}
	return nil
}

// familiesOf tells which packets a listener takes: its own family's, and with IPV6_V6ONLY off both.
func familiesOf(fd int) ([]uint32, error) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return nil, err
	}
	if domain == unix.AF_INET {
		return []uint32{unix.AF_INET}, nil
	}
	only, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
	if err != nil {
		return nil, err
	}
	if only == 1 {
		return []uint32{unix.AF_INET6}, nil
	}
	return []uint32{unix.AF_INET6, unix.AF_INET}, nil
}

func (b *Backend) dropListeners(cookie uint64) {
	for _, family := range []uint32{unix.AF_INET, unix.AF_INET6} {
		// Missing is the usual case: the entry goes with its socket.
		_ = b.inst.Maps.RfListeners.Delete(bpf.ListenerKey{Netns: cookie, Family: family})
	}
}

func (b *Backend) lookup(name string) *scope {
	b.index.RLock()
	defer b.index.RUnlock()
	return b.byName[name]
}

func (b *Backend) ofNS(cookie uint64) *scope {
	b.index.RLock()
	defer b.index.RUnlock()
	return b.byNS[cookie]
}

// keysOf lists a table's keys. It reads on when the table changes under it, and may then miss or repeat some.
func keysOf[K comparable](m *ebpf.Map) ([]K, error) {
	var out []K
	var key K
	err := m.NextKey(nil, &key)
	for ; err == nil && len(out) <= 2*int(m.MaxEntries()); err = m.NextKey(key, &key) {
		out = append(out, key)
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		err = nil
	}
	return out, err
}

// sweepTable deletes the entries whose key drop chooses.
func sweepTable[K comparable](m *ebpf.Map, drop func(K) bool) error {
	keys, err := keysOf[K](m)
	errs := []error{err}
	for _, k := range keys {
		if drop(k) {
			errs = append(errs, ignoreMissing(m.Delete(k)))
		}
	}
	return errors.Join(errs...)
}

func ignoreMissing(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}
