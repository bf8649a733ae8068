package tunnel

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/proxy/socket"
)

// serverNameSuffix is the fixed label under which a client names the port it
// wants: "p443.ringfence.internal". The top-level name is reserved for private
// use, and the name is never resolved.
const serverNameSuffix = ".ringfence.internal"

// ServerName is the SNI that asks for the workload behind a port.
func ServerName(port uint16) string {
	return "p" + strconv.FormatUint(uint64(port), 10) + serverNameSuffix
}

// portOf reads what ServerName wrote. Any other name, such as a foreign peer
// may send, is as good as none.
func portOf(name string) (uint16, bool) {
	label, ok := strings.CutSuffix(name, serverNameSuffix)
	if !ok || len(label) < 2 || label[0] != 'p' || label[1] < '1' || label[1] > '9' {
		return 0, false
	}
	port, err := strconv.ParseUint(label[1:], 10, 16)
	return uint16(port), err == nil
}

// Verify checks a peer's chain (leaf first, DER) as X.509-SVID and names the peer.
type Verify func(chain [][]byte) (spiffeid.ID, error)

// ErrIdentity is matched by handshake errors that are about who the peer is.
var ErrIdentity = errors.New("tunnel: peer's identity is not accepted")

// ClientConfig is one outgoing connection.
type ClientConfig struct {
	Certificate *tls.Certificate
	Verify      Verify
	// Port is the workload's port on the far side, sent as SNI. Zero sends no SNI.
	Port uint16
	// Deadline bounds the handshake.
	Deadline time.Time
}

// ServerConfig is one listener's side of incoming connections.
type ServerConfig struct {
	// Certificate returns the SVID of the workload that owns port at the
	// connection's own address. named is false when the client named no port.
	// who is that workload's identity.
	Certificate func(ctx context.Context, local netip.AddrPort, port uint16, named bool) (cert *tls.Certificate, who spiffeid.ID, err error)
	Verify      Verify
	Handler     Handler
	Deadline    time.Duration // bounds the handshake
}

// base holds what both sides do alike: TLS 1.3 only, ALPN exactly h2, no
// tickets (a resumed session would skip the look at the peer's certificate),
// and records of full size from the start.
func base() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		NextProtos:                  []string{"h2"},
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
}

// identify is called by TLS on each handshake, before any application octet.
func identify(cs tls.ConnectionState, verify Verify, usage x509.ExtKeyUsage) (spiffeid.ID, error) {
	if cs.NegotiatedProtocol != "h2" {
		return spiffeid.ID{}, fmt.Errorf("%w: ALPN is %q, not h2", ErrIdentity, cs.NegotiatedProtocol)
	}
	if len(cs.PeerCertificates) == 0 {
		return spiffeid.ID{}, fmt.Errorf("%w: no certificate", ErrIdentity)
	}
	chain := make([][]byte, len(cs.PeerCertificates))
	for i, cert := range cs.PeerCertificates {
		chain[i] = cert.Raw
	}
	// X.509-SVID section 4.4: if there are key usages, both are there.
	uses := cs.PeerCertificates[0].ExtKeyUsage
	if len(uses) > 0 && !slices.Contains(uses, usage) && !slices.Contains(uses, x509.ExtKeyUsageAny) {
		return spiffeid.ID{}, fmt.Errorf("%w: certificate is not for this side of TLS", ErrIdentity)
	}
	id, err := verify(chain)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	return id, nil
}

// Client makes the client end of a tunnel on a connected socket, which it takes
// over. The peer's identity is verified when it returns; Run must be called.
func Client(sock *socket.Conn, c ClientConfig) (*Conn, error) {
	t := newConn(sock, true)
	cfg := base()
	cfg.Certificates = []tls.Certificate{*c.Certificate}
	cfg.InsecureSkipVerify = true // no host names here: identify does the checking
	cfg.VerifyConnection = func(cs tls.ConnectionState) (err error) {
		t.peer, err = identify(cs, c.Verify, x509.ExtKeyUsageServerAuth)
		return err
	}
	if c.Port != 0 {
		cfg.ServerName = ServerName(c.Port)
	}
	t.cert = c.Certificate
	if err := t.handshake(tls.Client(t.wire, cfg), c.Deadline); err != nil {
		return nil, err
	}
	return t, nil
}

// Server makes the server end of a tunnel on an accepted socket, which it
// takes over. The peer's identity is verified when it returns; Run must be called.
func Server(ctx context.Context, sock *socket.Conn, c ServerConfig) (*Conn, error) {
	t := newConn(sock, false)
	t.handler = c.Handler
	cfg := base()
	cfg.ClientAuth = tls.RequireAnyClientCert // and identify does the checking
	cfg.VerifyConnection = func(cs tls.ConnectionState) (err error) {
		if t.peer, err = identify(cs, c.Verify, x509.ExtKeyUsageClientAuth); err == nil {
			t.hash = sha256.Sum256(cs.PeerCertificates[0].Raw)
		}
		return err
	}
	cfg.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		port, named := portOf(hello.ServerName)
		cert, who, err := c.Certificate(ctx, t.Local, port, named)
		t.port, t.self, t.cert = port, who, cert
		return cert, err
	}
	if err := t.handshake(tls.Server(t.wire, cfg), time.Now().Add(c.Deadline)); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *Conn) handshake(conn *tls.Conn, deadline time.Time) error {
	t.tls = conn
	if err := t.sock.SetDeadline(deadline); err != nil {
		t.sock.Close()
		return fmt.Errorf("tunnel: %w", err)
	}
	err := conn.Handshake()
	if err == nil {
		err = t.sock.SetDeadline(time.Time{})
	}
	if err != nil {
		t.wire.release()
		t.sock.Close()
		return fmt.Errorf("tunnel handshake with %s: %w", t.Remote, err)
	}
	t.wire.establish(t.settle)
	t.record = tlsRecord{conn, t.wire}
	t.greet()
	return nil
}
