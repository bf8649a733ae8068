// Package proxy is the relay: it takes captured connections, asks who is at
// each end and whether they may talk, and moves their bytes through filters to
// a carrier (a mutual TLS tunnel, a plain socket, or the local workload).
//
// It does not know how a workload was attested, where policies come from, how
// SVIDs are made, or how a connection was captured: it is given an
// [Identifier], a [Decider], [Credentials] and, per scope, a [Network].
//
// The invariant: no byte reaches an application, or leaves the node, before a
// permit. An error while finding out is a refusal.
package proxy

import (
	"context"
	"crypto/tls"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
)

// Identifier names the workloads at the ends of a connection. Its methods are
// called from many goroutines and return within ctx.
type Identifier interface {
	// Caller names the workload that opened a captured outbound connection,
	// from f.Caller. It returns [workload.ErrUnknown] when no entry matches and
	// [workload.ErrGone] when the process ended before it could be named.
	Caller(ctx context.Context, f flow.Flow) (workload.Identity, error)
	// Owner names the workload that listens on addr in the scope. An
	// unspecified address in addr asks for any listener on the port. It returns
	// [workload.ErrUnknown] when nothing listens there and
	// [workload.ErrAmbiguous] when the listeners' identities disagree.
	Owner(ctx context.Context, scope string, addr netip.AddrPort) (workload.Identity, error)
	// Sole names the only workload that listens in the scope, or the node
	// itself when there is more or less than one. Peers that send no SNI get it.
	Sole(ctx context.Context, scope string) (workload.Identity, error)
}

// Decider decides connections and requests by policy.
type Decider interface {
	// Open starts deciding one connection. Nothing is decided or recorded yet.
	Open(c authz.Connection) (authz.Session, error)
}

// Credentials holds the SVIDs of this node's workloads.
type Credentials interface {
	// Certificate returns id's current X.509-SVID with its private key, minting
	// one at first use. The same pointer is returned until it is renewed.
	Certificate(ctx context.Context, id spiffeid.ID) (*tls.Certificate, error)
	// Verify checks a peer's chain (leaf first, DER) as X.509-SVID against the
	// bundle of the trust domain in the leaf, and returns the leaf's SPIFFE ID.
	// Expired, foreign or malformed chains are errors.
	Verify(chain [][]byte) (spiffeid.ID, error)
}

// Dial says what a socket of the agent is about to be used for.
type Dial struct {
	// To is where the socket will connect.
	To netip.AddrPort
	// Client is the address the local workload shall see as its peer; invalid
	// when the socket leaves the node.
	Client netip.AddrPort
	// Flow is the captured flow on whose behalf the agent dials; zero for probes.
	Flow flow.Flow
}

// Network is one scope's network namespace and its capture back end. Its
// methods are called from many goroutines and do not block on peers.
type Network interface {
	// Origin tells where a connection accepted on the outbound listener was
	// going and who opened it, or on the inbound listener which port was dialled. A
	// connection that was dialled straight to the listener, or about which nothing is
	// known, is an error, and the caller resets it. local and remote are the
	// accepted socket's addresses and fd the socket itself, owned by the caller.
	Origin(d flow.Direction, fd int, local, remote netip.AddrPort) (flow.Flow, error)
	// Socket opens a TCP socket in the scope's namespace: family is AF_INET or
	// AF_INET6, non-blocking, close-on-exec, never MPTCP.
	Socket(family int) (fd int, err error)
	// BeforeConnect prepares fd for a dial: it exempts it from capture, binds it
	// to the caller's device or source, and files the client's address for the workload.
	BeforeConnect(fd int, d Dial) error
	// Local reports whether ip is an address of the scope's namespace itself:
	// one of its interfaces', any loopback address, or the unspecified one.
	Local(ip netip.Addr) bool
	// Mesh reports whether a peer at ip may have an agent: it lies in a mesh
	// network and is no metadata service. Only such peers are ever probed.
	Mesh(ip netip.Addr) bool
	// Refused tells the back end that policy refuses this caller to this
	// destination whatever it sends, so that the kernel may refuse the next
	// connect(2) by itself until policy changes.
	Refused(f flow.Flow, who workload.Identity)
}
