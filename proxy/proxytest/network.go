package proxytest

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/proxy/socket"
)

// Network is a capture back end of one host on a loopback address, without
// capturing anything: a test connects to a listener with Dial, which says where
// the workload was going.
type Network struct {
	tb testing.TB
	// IP is the host's address, such as 127.0.1.1.
	IP netip.Addr

	mu      sync.Mutex
	origins map[netip.AddrPort]origin // by the connection's source
	any     *origin
	dials   []proxy.Dial
	refused []flow.Flow
	mesh    bool
	// Kept from Listen, for CloseListeners.
	listeners []*os.File
}

// NewNetwork makes a host at ip whose peers may have agents.
func NewNetwork(tb testing.TB, ip string) *Network {
	return &Network{tb: tb, IP: netip.MustParseAddr(ip), mesh: true, origins: make(map[netip.AddrPort]origin)}
}

type origin struct {
	to     netip.AddrPort
	caller workload.Evidence
}

// Dial connects to one of the host's listeners, as a workload of uid whose
// connection to another address was captured.
func (n *Network) Dial(listener, to netip.AddrPort, uid uint32) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	d.SetMultipathTCP(false)
	var from netip.AddrPort
	// The source port is chosen before the SYN, as capture learns it.
	d.Control = func(_, _ string, raw syscall.RawConn) error {
		var err error
		if ctlErr := raw.Control(func(fd uintptr) {
			if err = unix.Bind(int(fd), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
				return
			}
			if from, err = socket.LocalAddr(int(fd)); err == nil {
				n.note(from, origin{to, workload.Evidence{UID: uid, Source: workload.SourceHook}})
			}
		}); ctlErr != nil {
			return ctlErr
		}
		return err
	}
	c, err := d.Dial("tcp4", listener.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// ExpectAll makes every connection that was not opened by Dial one of uid's to an address.
func (n *Network) ExpectAll(to netip.AddrPort, uid uint32) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.any = &origin{to, workload.Evidence{UID: uid, Source: workload.SourceHook}}
}

func (n *Network) note(from netip.AddrPort, o origin) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.origins[from] = o
}

// SetMesh says whether peers may have agents.
func (n *Network) SetMesh(mesh bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mesh = mesh
}

// Dials are the sockets prepared so far.
func (n *Network) Dials() []proxy.Dial {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]proxy.Dial(nil), n.dials...)
}

// RefusedFlows are the flows told to the kernel as refused.
func (n *Network) RefusedFlows() []flow.Flow {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]flow.Flow(nil), n.refused...)
}

// CloseListeners closes what Listen has opened, as an agent does that ends.
func (n *Network) CloseListeners() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, f := range n.listeners {
		_ = f.Close()
	}
}

// Origin implements proxy.Network.
func (n *Network) Origin(d flow.Direction, fd int, local, remote netip.AddrPort) (flow.Flow, error) {
	if fd < 0 || !local.IsValid() || !remote.IsValid() {
		n.tb.Errorf("Origin(%v, %d, %v, %v)", d, fd, local, remote)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	o, ok := n.origins[remote]
	if !ok && n.any != nil {
		o, ok = *n.any, true
	}
	if !ok {
		return flow.Flow{}, errors.New("not redirected")
	}
	delete(n.origins, remote)
	return flow.Flow{Direction: d, Source: remote, Destination: o.to, Caller: o.caller}, nil
}

// Socket implements proxy.Network.
func (n *Network) Socket(family int) (int, error) {
	return unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
}

// BeforeConnect implements proxy.Network. It binds the socket to the host's address.
func (n *Network) BeforeConnect(fd int, d proxy.Dial) error {
	n.mu.Lock()
	n.dials = append(n.dials, d)
	if len(n.dials) > 100 {
		n.dials = n.dials[50:]
	}
	n.mu.Unlock()
	if !n.IP.Is4() || !d.To.Addr().Is4() {
		return nil
	}
	// Without it the port is chosen before the destination is known, and ten
	// thousand short connections run out of them.
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	return unix.Bind(fd, &unix.SockaddrInet4{Addr: n.IP.As4()})
}

// Local implements proxy.Network.
func (n *Network) Local(ip netip.Addr) bool { return ip == n.IP }

// Mesh implements proxy.Network.
func (n *Network) Mesh(netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mesh
}

// Refused implements proxy.Network.
func (n *Network) Refused(f flow.Flow, _ workload.Identity) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refused = append(n.refused, f)
}

// Listen opens a listening socket on the host's address and returns its
// descriptor, which is closed when the test ends, and its address. Port zero picks one.
func (n *Network) Listen(port uint16) (fd int, addr netip.AddrPort) {
	n.tb.Helper()
	var config net.ListenConfig
	config.SetMultipathTCP(false) // which refuses some TCP options
	any, err := config.Listen(context.Background(), "tcp", netip.AddrPortFrom(n.IP, port).String())
	if err != nil {
		n.tb.Fatal(err)
	}
	l := any.(*net.TCPListener)
	addr = l.Addr().(*net.TCPAddr).AddrPort()
	f, err := l.File()
	if err != nil {
		n.tb.Fatal(err)
	}
	_ = l.Close() // the copy goes on listening
	n.tb.Cleanup(func() { _ = f.Close() })
	n.mu.Lock()
	n.listeners = append(n.listeners, f)
	n.mu.Unlock()
	return int(f.Fd()), netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
}
