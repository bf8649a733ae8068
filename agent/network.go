package agent

import (
	"net/netip"

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
}

var _ proxy.Network = (*network)(nil)

func (n *network) Origin(d flow.Direction, fd int, local, remote netip.AddrPort) (flow.Flow, error) {
	f, err := n.backend.Origin(n.scope, d, fd, local, remote)
	if err != nil {
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

func (n *network) Socket(family int) (int, error) {
	return n.ns.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
}

func (n *network) BeforeConnect(fd int, d proxy.Dial) error {
	return n.backend.BeforeConnect(n.scope, fd, d.To, d.Client, d.Flow)
}

func (n *network) Local(ip netip.Addr) bool { return n.addrs.isLocal(ip) }

func (n *network) Mesh(ip netip.Addr) bool { return n.addrs.inMesh(ip, n.mesh) }

func (n *network) Refused(f flow.Flow, who workload.Identity) {
	n.backend.Refused(n.scope, f, who)
}
