package ebpf

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ringfence.dev/bpf"
)

// maxRoutes bounds one scope's share of the route table. A namespace with more
// (a router with a full table) keeps its local addresses only, and counts as
// unknown: every destination is then redirected.
const maxRoutes = 4096

// plainRules are the priorities of the rules that the kernel makes itself: local, main, default.
var plainRules = map[int]bool{0: true, 32766: true, 32767: true}

// view is how a namespace routes, as far as the connect hook needs to know.
type view struct {
	routes  map[netip.Prefix]bpf.Route
	locals  map[netip.Addr]bool
	unknown bool
}

// readView reads the routes of the current thread's namespace.
func readView() (view, error) {
	v := view{routes: map[netip.Prefix]bpf.Route{}, locals: map[netip.Addr]bool{}}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if err := v.addRules(family); err != nil {
			return v, err
		}
		if err := v.addRoutes(family); err != nil {
			return v, err
		}
	}
	if len(v.routes) > maxRoutes {
		v.unknown = true
		for p, r := range v.routes {
			if r.Kind != bpf.RouteLocal {
				delete(v.routes, p)
			}
		}
	}
	return v, nil
}

// addRules notes whether policy routing makes the main table an incomplete answer.
func (v *view) addRules(family int) error {
	rules, err := netlink.RuleList(family)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // no such family, or no policy routing in this kernel
	}
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	for _, r := range rules {
		// A rule of priority 0 comes without the attribute, which the library shows as -1.
		if !plainRules[max(r.Priority, 0)] {
			v.unknown = true
		}
	}
	return nil
}

func (v *view) addRoutes(family int) error {
	sources, err := sourcesByLink(family)
	if err != nil {
		return err
	}
	best := map[netip.Prefix]int{}
	all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
	list, err := netlink.RouteListFiltered(family, all, netlink.RT_FILTER_TABLE)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range list {
		p, entry, ok := entryOf(family, &r, sources)
		if !ok {
			continue
		}
		if m, seen := best[p]; seen && m <= r.Priority {
			continue // the lower metric wins
		}
		best[p], v.routes[p] = r.Priority, entry
		if entry.Kind == bpf.RouteLocal && p.IsSingleIP() {
			v.locals[p.Addr()] = true
		}
	}
	return nil
}

// entryOf turns a route into the hook's record; false for what says nothing about outgoing TCP.
func entryOf(family int, r *netlink.Route, sources map[int]netip.Addr) (p netip.Prefix, e bpf.Route, ok bool) {
	switch r.Table {
	case unix.RT_TABLE_LOCAL, unix.RT_TABLE_MAIN, unix.RT_TABLE_DEFAULT:
	default:
		return p, e, false // reached by rules of the administrator's, and so unknown anyway
	}
	if r.Flags&unix.RTNH_F_DEAD != 0 {
		return p, e, false
	}
	switch r.Type {
	case unix.RTN_UNICAST:
		src, valid := netip.AddrFromSlice(r.Src)
		if !valid {
			src = sources[r.LinkIndex]
		}
		e = bpf.Route{Kind: bpf.RouteUnicast, Source: bpf.Address(src.Unmap())}
	case unix.RTN_LOCAL:
		e.Kind = bpf.RouteLocal
	case unix.RTN_BROADCAST:
		e.Kind = bpf.RouteBroadcast
	case unix.RTN_UNREACHABLE:
		e = bpf.Route{Kind: bpf.RouteError, Error: uint32(unix.EHOSTUNREACH)}
	case unix.RTN_PROHIBIT:
		e = bpf.Route{Kind: bpf.RouteError, Error: uint32(unix.EACCES)}
	case unix.RTN_BLACKHOLE:
		e = bpf.Route{Kind: bpf.RouteError, Error: uint32(unix.EINVAL)}
	default: // throw, anycast, multicast
		return p, e, false
	}
	return prefixOf(family, r), e, true
}

func prefixOf(family int, r *netlink.Route) netip.Prefix {
	if r.Dst == nil {
		if family == netlink.FAMILY_V4 {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	ones, _ := r.Dst.Mask.Size()
	ip, _ := netip.AddrFromSlice(r.Dst.IP)
	if family == netlink.FAMILY_V4 {
		ip = ip.Unmap()
	}
	return netip.PrefixFrom(ip, ones).Masked()
}

// sourcesByLink picks, for each interface, the address that connections leaving
// by it most likely carry: its first of global scope that is in use.
func sourcesByLink(family int) (map[int]netip.Addr, error) {
	out := map[int]netip.Addr{}
	list, err := netlink.AddrList(nil, family)
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return out, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		_, taken := out[a.LinkIndex]
		if !ok || taken || a.Scope != unix.RT_SCOPE_UNIVERSE {
			continue
		}
		if a.Flags&(unix.IFA_F_SECONDARY|unix.IFA_F_DEPRECATED|unix.IFA_F_TENTATIVE) != 0 {
			continue
		}
		out[a.LinkIndex] = ip.Unmap()
	}
	return out, nil
}

// syncRoutes brings the scope's share of the route table in line with its
// namespace. New routes enter before old ones leave. A table that is full makes
// the scope unknown, which redirects more, never less.
func (b *Backend) syncRoutes(s *scope) error {
	var v view
	err := s.def.NS.Do(func() (err error) {
		v, err = readView()
		return err
	})
	if err != nil {
		return fmt.Errorf("routes of scope %s: %w", s.name, err)
	}
	for p, r := range v.routes {
		if old, ok := s.routes[p]; ok && old == r {
			continue
		}
		if err := b.inst.Maps.RfRoutes.Put(bpf.Prefix(s.cookie, p), &r); err != nil {
			b.log.Warn("route table is full; every destination is redirected", "scope", s.name, "error", err)
			v.unknown = true
			break
		}
	}
	s.locals.Store(&v.locals)
	s.unknown = v.unknown
	for p := range s.routes {
		if _, ok := v.routes[p]; !ok {
			if err := ignoreMissing(b.inst.Maps.RfRoutes.Delete(bpf.Prefix(s.cookie, p))); err != nil {
				return fmt.Errorf("routes of scope %s: %w", s.name, err)
			}
		}
	}
	s.routes = v.routes
	return nil
}

// isLocal reports whether ip is an address of the scope's namespace. The caller holds no lock.
func (b *Backend) isLocal(s *scope, ip netip.Addr) bool {
	ip = ip.Unmap()
	if ip.IsLoopback() || ip.IsUnspecified() {
		return true
	}
	locals := s.locals.Load()
	return locals != nil && (*locals)[ip]
}
