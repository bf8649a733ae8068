package ebpf

import (
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/bpf"
	"ringfence.dev/policy/authz"
)

// Verify reads back what the kernel has for a scope: links and their programs,
// the scope's record, its steering and the inbound listeners, the agent's record.
func (b *Backend) Verify(name string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.lookup(name)
	if s == nil {
		return []string{capture.ErrNoScope.Error()}
	}
	out := b.inst.Check()
	var have bpf.Scope
	if err := b.inst.Maps.RfScopes.Lookup(s.cookie, &have); err != nil {
		out = append(out, fmt.Sprintf("scope table: %v", err))
	} else if have != s.record {
		out = append(out, "scope table: the record is not what was written")
	}
	if s.def.Mode != authz.Watch {
		out = append(out, b.verifyInbound(s)...)
	}
	return append(out, b.verifyAgent()...)
}

func (b *Backend) verifyInbound(s *scope) (out []string) {
	if err := b.inst.CheckSteer(s.cookie); err != nil {
		out = append(out, err.Error())
	}
	for family, name := range map[uint32]string{unix.AF_INET: "IPv4", unix.AF_INET6: "IPv6"} {
		var cookie uint64
		key := bpf.ListenerKey{Netns: s.cookie, Family: family}
		if b.inst.Maps.RfListeners.Lookup(key, &cookie) == nil {
			continue
		}
		if family == unix.AF_INET6 && !b.hasIPv6(s) {
			continue
		}
		out = append(out, "no inbound listener for "+name)
	}
	return out
}

// hasIPv6 reports whether the namespace can speak IPv6 at all. When that cannot be told, it can.
func (b *Backend) hasIPv6(s *scope) bool {
	fd, err := s.def.NS.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	locals := s.locals.Load()
	if locals == nil {
		return true
	}
	for ip := range *locals {
		if ip.Is6() {
			return true
		}
	}
	return false
}

func (b *Backend) verifyAgent() (out []string) {
	var a bpf.Agent
	if err := b.inst.Maps.RfAgent.Lookup(uint32(0), &a); err != nil {
		return []string{fmt.Sprintf("agent record: %v", err)}
	}
	if a.Cgroup != b.host {
		out = append(out, "agent record: another agent has taken this instance over")
	}
	if now := monotonic(); now > a.Heartbeat && now-a.Heartbeat > a.Limit {
		out = append(out, "the agent's heartbeat is stale")
	}
	return out
}

// Tables tells the fill of the tables that grow with traffic or with scopes.
func (b *Backend) Tables() []capture.Table {
	m := &b.inst.Maps
	var out []capture.Table
	for _, t := range []struct {
		name string
		m    *ebpf.Map
		fill func(*ebpf.Map) int
	}{
		{"rf_scopes", m.RfScopes, fillOf[uint64]},
		{"rf_cgroups", m.RfCgroups, fillOf[bpf.CgroupKey]},
		{"rf_notes", m.RfNotes, fillOf[bpf.ConnKey]},
		{"rf_exempt", m.RfExempt, fillOf[bpf.ConnKey]},
		{"rf_ports", m.RfPorts, fillOf[bpf.PortKey]},
		{"rf_listeners", m.RfListeners, fillOf[bpf.ListenerKey]},
		{"rf_routes", m.RfRoutes, fillOf[bpf.RouteKey]},
		{"rf_denies", m.RfDenies, fillOf[bpf.DenyKey]},
	} {
		out = append(out, capture.Table{Name: t.name, Entries: t.fill(t.m), Max: int(t.m.MaxEntries())})
	}
	return out
}

// Counters tells how often the programs did what, by reason, since the tables were made.
func (b *Backend) Counters() (map[string]uint64, error) {
	all, err := b.inst.Counters()
	out := make(map[string]uint64, len(all))
	for reason, n := range all {
		out[reason.String()] = n
	}
	return out, err
}

func fillOf[K comparable](m *ebpf.Map) int {
	keys, err := keysOf[K](m)
	if err != nil {
		return -1 // could not be read, which is not empty
	}
	return len(keys)
}
