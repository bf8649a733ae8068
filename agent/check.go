package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/svid"
	"ringfence.dev/proxy"
)

// checkTimeout bounds each network step of a check.
const checkTimeout = 3 * time.Second

// Check walks the path from one scope to a peer's agent: name, reachability,
// TLS, identity, and bytes through the tunnel. It stops at the first failure,
// whose step says the fix. An empty scope means the first that has listeners.
func (a *Agent) Check(ctx context.Context, scope, peer string) (any, error) {
	sc, err := a.scopeForCheck(scope)
	if err != nil {
		return nil, err
	}
	if peer == "" {
		return nil, admin.BadRequest{Err: errors.New("name the peer to check")}
	}
	r := &admin.CheckReport{Scope: sc.settings.Name, Peer: peer}
	step := func(name, detail, fix string, err error) bool {
		s := admin.CheckStep{Name: name, OK: err == nil, Detail: detail}
		if err != nil {
			s.Detail, s.Fix = err.Error(), fix
		}
		r.Steps = append(r.Steps, s)
		r.OK = err == nil
		return err == nil
	}

	ip, err := resolvePeer(ctx, peer)
	if !step("name", fmt.Sprintf("%s is %s", peer, ip), "give an IP address, or a name that resolves on this host", err) {
		return r, nil
	}
	conn, err := a.dialForCheck(ctx, sc, netip.AddrPortFrom(ip, capture.TunnelPort))
	if !step("reachability", fmt.Sprintf("port %d answers", capture.TunnelPort), reachFix(err, ip), err) {
		return r, nil
	}
	defer conn.Close()

	node := a.nodeIdentity()
	cert, err := a.svids.Certificate(ctx, node.ID)
	if !step("own svid", node.ID.String(), "this agent cannot get its own certificate: see the CA under state_dir", err) {
		return r, nil
	}
	state, id, err := a.handshake(ctx, conn, cert)
	if !step("tls", tls.VersionName(state.Version)+" "+tls.CipherSuiteName(state.CipherSuite), "the peer's port is not an agent's, or its agent is too old", transportError(err)) {
		return r, nil
	}
	if !step("clock", "the peer's certificate is valid now", "set both clocks (NTP): they differ by more than the certificates allow", clockError(err)) {
		return r, nil
	}
	if !step("trust bundle and svid", id, "the two hosts do not share a trust domain: copy the bundle (`ringfence ca bundle show`, then `ringfence ca bundle install`) or an intermediate of the same root", err) {
		return r, nil
	}
	rtt, err := pingTunnel(state.conn)
	step("tunnel", fmt.Sprintf("8 bytes there and back in %s", rtt.Round(10*time.Microsecond)), "the peer's agent accepted the certificate check on our side but closed the tunnel: look at its log, it probably refuses our certificate", err)
	return r, nil
}

// scopeForCheck returns the scope named, or else the first that has listeners,
// or else the first.
func (a *Agent) scopeForCheck(name string) (*scope, error) {
	if name != "" {
		return a.scopeNamed(name)
	}
	all := a.scopeList()
	if len(all) == 0 {
		return nil, admin.BadRequest{Err: errors.New("the agent has no scope to look from: add one with `ringfence scope add`")}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, sc := range all {
		if sc.relay != nil {
			return sc, nil
		}
	}
	return all[0], nil
}

// resolvePeer takes an address or a name. Names are resolved by the host's own resolver.
func resolvePeer(ctx context.Context, peer string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(strings.Trim(peer, "[]"))
	if err != nil {
		ctx, cancel := context.WithTimeout(ctx, checkTimeout)
		defer cancel()
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", peer)
		if err != nil {
			return netip.Addr{}, err
		}
		ip = ips[0]
	}
	ip = ip.Unmap()
	if ip.Zone() != "" || !ip.IsValid() || ip.IsUnspecified() || ip.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("%s is no address that agents use with one another", ip)
	}
	return ip, nil
}

// dialForCheck connects from inside the scope, as the relay would.
func (a *Agent) dialForCheck(ctx context.Context, sc *scope, to netip.AddrPort) (net.Conn, error) {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := sc.network.Socket(family)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "check")
	defer file.Close()
	if err := sc.network.BeforeConnect(fd, proxy.Dial{To: to}); err != nil {
		return nil, err
	}
	if err := connect(file, to, time.Now().Add(checkTimeout)); err != nil {
		return nil, fmt.Errorf("connect to %s: %w", to, err)
	}
	return net.FileConn(file)
}

// connect starts a non-blocking connect and waits on the runtime's poller for its end.
func connect(file *os.File, to netip.AddrPort, deadline time.Time) error {
	rc, err := file.SyscallConn()
	if err != nil {
		return err
	}
	if err := file.SetDeadline(deadline); err != nil {
		return err
	}
	started, failed := false, error(nil)
	err = rc.Write(func(fd uintptr) bool {
		if !started {
			started = true
			failed = unix.Connect(int(fd), sockaddr(to))
			return !errors.Is(failed, unix.EINPROGRESS)
		}
		var done bool
		done, failed = connected(int(fd))
		return done
	})
	if err != nil {
		return err
	}
	return failed
}

// connected reports whether a connect has ended, and how. Writable alone says
// nothing: a socket that was polled before the connect is told to be.
func connected(fd int) (done bool, err error) {
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		return true, err
	case code != 0:
		return true, unix.Errno(code)
	}
	_, err = unix.Getpeername(fd)
	if errors.Is(err, unix.ENOTCONN) {
		return false, nil
	}
	return true, err
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func reachFix(err error, ip netip.Addr) string {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Sprintf("no agent listens on %s: start one there with a scope in dry-run or enforce mode", ip)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ETIMEDOUT):
		return fmt.Sprintf("a firewall drops TCP %d to %s: open it between the hosts", capture.TunnelPort, ip)
	default:
		return "see the host's routes and firewall"
	}
}

// transportError keeps what is wrong with the transport and hides what is wrong with the certificate.
func transportError(err error) error {
	if errors.Is(err, errPeerSVID) {
		return nil
	}
	return err
}

func clockError(err error) error {
	if errors.Is(err, svid.ErrTime) {
		return err
	}
	return nil
}

var errPeerSVID = errors.New("the peer's certificate is refused")

type checkedTLS struct {
	tls.ConnectionState
	conn *tls.Conn
}

func (a *Agent) handshake(ctx context.Context, conn net.Conn, cert *tls.Certificate) (checkedTLS, string, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	var id string
	c := tls.Client(conn, &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		Certificates:           []tls.Certificate{*cert},
		InsecureSkipVerify:     true, // names are SPIFFE IDs: VerifyConnection does the whole check
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			chain := make([][]byte, len(cs.PeerCertificates))
			for i, c := range cs.PeerCertificates {
				chain[i] = c.Raw
			}
			peer, err := a.svids.Verify(chain)
			if err != nil {
				return fmt.Errorf("%w: %w", errPeerSVID, err)
			}
			id = peer.String()
			return nil
		},
	})
	err := c.HandshakeContext(ctx)
	return checkedTLS{c.ConnectionState(), c}, id, err
}

// pingTunnel opens an HTTP/2 connection and waits for its answer to one PING
// (RFC 9113 section 6.7): bytes that have gone through the tunnel both ways,
// without asking anything of policy or of a workload.
func pingTunnel(c *tls.Conn) (time.Duration, error) {
	deadline := time.Now().Add(checkTimeout)
	if err := c.SetDeadline(deadline); err != nil {
		return 0, err
	}
	data := [8]byte{'r', 'f', 'c', 'h', 'e', 'c', 'k', 1}
	start := time.Now()
	var out bytes.Buffer
	out.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&out, c)
	if err := errors.Join(fr.WriteSettings(), fr.WritePing(false, data)); err != nil {
		return 0, err
	}
	if _, err := c.Write(out.Bytes()); err != nil {
		return 0, err
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return 0, fmt.Errorf("wait for the answer to a ping: %w", err)
		}
		if p, ok := f.(*http2.PingFrame); ok && p.IsAck() && p.Data == data {
			return time.Since(start), nil
		}
	}
}
