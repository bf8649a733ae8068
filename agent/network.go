package agent

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/workload"
	"ringfence.dev/cni/netns"
	"ringfence.dev/proxy"
	"ringfence.dev/proxy/flow"
)

// network is one scope's namespace as the relay sees it.
type network struct {
	scope   string
	ns      *netns.Handle
	addrs   *addresses
	backend capture.Backend
	mesh    []netip.Prefix
	byUnit  bool // see identitiesByUnit
	refused func(flow.Flow, workload.Identity)
	log     *slog.Logger
	told    atomic.Int64 // when tellUnknown last spoke, in Unix seconds
}

var _ proxy.Network = (*network)(nil)

func (n *network) Origin(d flow.Direction, fd int, local, remote netip.AddrPort) (flow.Flow, error) {
	f, err := n.backend.Origin(n.scope, d, fd, local, remote)
	if err != nil {
		n.tellUnknown(err, d, remote)
		return flow.Flow{}, err
	}
	// What connect(2) takes for loopback: 0.0.0.0 and :: (Linux sends both to itself).
	if ip := f.Destination.Addr(); ip.IsUnspecified() {
		if ip.Is4() {
			ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		} else {
			ip = netip.IPv6Loopback()
		}
		f.Destination = netip.AddrPortFrom(ip, f.Destination.Port())
	}
	return f, nil
}

// tellUnknown says, once a second at most, that a connection was reset because
// nobody knows where it was going or who opened it: nothing else is recorded of it.
func (n *network) tellUnknown(err error, d flow.Direction, remote netip.AddrPort) {
	now, last := time.Now().Unix(), n.told.Load()
	if now == last || !n.told.CompareAndSwap(last, now) {
		return
	}
	n.log.Warn("reset a connection of unknown origin", "scope", n.scope, "direction", d, "from", remote, "err", err)
}

func (n *network) Socket(family int) (int, error) {
	return n.ns.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
}

func (n *network) BeforeConnect(fd int, d proxy.Dial) error {
	return n.backend.BeforeConnect(n.scope, fd, d.To, d.Client, d.Flow)
}

func (n *network) Local(ip netip.Addr) bool { return n.addrs.isLocal(ip) }

func (n *network) Mesh(ip netip.Addr) bool { return n.addrs.inMesh(ip, n.mesh) }

func (n *network) Refused(f flow.Flow, who workload.Identity) {
	n.refused(f, who)
	if n.byUnit && strings.HasSuffix(who.Unit, ".service") && !strings.Contains(who.Unit, "/") {
		// The service's cgroup alone gave the identity: the refusal is good for all of
		// it, whichever of its programs dials next.
		who.Selectors = slices.DeleteFunc(slices.Clone(who.Selectors), func(s workload.Selector) bool { return s.Type != "systemd" })
	}
	n.backend.Refused(n.scope, f, who)
}

// identitiesByUnit reports whether a service's identity follows from what the
// connect hook knows (cgroup, uid, gid), because no registration entry asks for
// anything about the executable.
func identitiesByUnit(entries []Entry) bool {
	for _, e := range entries {
		for _, sel := range e.Selectors {
			kernel := sel.Type == "systemd" || strings.HasPrefix(sel.Value, "uid:") || strings.HasPrefix(sel.Value, "gid:")
			if !kernel {
				return false
			}
		}
	}
	return true
}
