package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/h1"
	"ringfence.dev/proxy/socket"
	"ringfence.dev/proxy/tunnel"
)

// Ports that the agent listens on inside each scope. A connection to one of
// them through the relay would come back to it, so it is refused.
const (
	outboundPort = 15001
	inboundPort  = 15006
)

func agentPort(port uint16) bool {
	return port == outboundPort || port == inboundPort || port == tunnel.Port
}

// Config is what a Relay needs. The three interfaces are required, every zero
// field beside them means its default.
type Config struct {
	Identifier  Identifier
	Decider     Decider
	Credentials Credentials

	// Pins fixes the identity that an agent at an address must show: a SPIFFE
	// ID, or a prefix of one that ends at a slash, such as
	// spiffe://shop.example/ns/db1 for any workload of host db1. A pinned peer
	// never gets plaintext from an enforcing scope.
	Pins map[netip.Addr]string

	// SetupTimeout bounds a connection from accept to its carrier. Zero means 10 s.
	SetupTimeout time.Duration
	// ProbeTimeout bounds the look whether a peer has an agent. Zero means 200 ms.
	ProbeTimeout time.Duration
	// NoAgentFor is how long "no agent" is believed. Zero means 1 min.
	NoAgentFor time.Duration
	// HalfClosedIdle is how long a connection that one side has finished may be
	// silent before it is reset. Zero means 1 h. Others have no idle limit.
	HalfClosedIdle time.Duration
	// KeepAlive and UserTimeout apply to every socket of the relay. Zero means
	// 3 min and 5 min.
	KeepAlive, UserTimeout time.Duration
	// Unused is how long a tunnel without streams is kept; zero means 5 min.
	// Retired is how long streams go on in a tunnel whose leaf was replaced; zero means 24 h.
	Unused, Retired time.Duration
	// MaxConnections bounds the live connections of the relay; further ones are
	// reset at once. Zero means 65,536: two sockets each fit a descriptor limit of 2^17.
	MaxConnections int
	// MaxPeers bounds what is remembered of peers. Zero means 16,384.
	MaxPeers int
	// HTTP holds the limits of the HTTP/1 filter; its Mode and Strip are the relay's.
	HTTP h1.Config
	// Baggage is sent with every tunnelled connection, for HBONE peers that show it. May be empty.
	Baggage string
}

func (c Config) checked() (Config, error) {
	if c.Identifier == nil || c.Decider == nil || c.Credentials == nil {
		return c, errors.New("proxy: Identifier, Decider and Credentials are required")
	}
	for ip, pin := range c.Pins {
		if !strings.HasPrefix(pin, "spiffe://") || ip != ip.Unmap() {
			return c, fmt.Errorf("proxy: pin %s for %s: want an address (not v4-mapped) and a SPIFFE ID", pin, ip)
		}
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.SetupTimeout, 10*time.Second)
	def(&c.ProbeTimeout, 200*time.Millisecond)
	def(&c.NoAgentFor, time.Minute)
	def(&c.HalfClosedIdle, time.Hour)
	def(&c.KeepAlive, 3*time.Minute)
	def(&c.UserTimeout, 5*time.Minute)
	if c.MaxConnections == 0 {
		c.MaxConnections = 65536
	}
	if c.MaxPeers == 0 {
		c.MaxPeers = 16384
	}
	return c, nil
}

func (c *Config) timeouts() socket.Timeouts {
	return socket.Timeouts{KeepAlive: c.KeepAlive, User: c.UserTimeout}
}

// ScopeConfig is one scope to relay for.
type ScopeConfig struct {
	Name    string
	Mode    authz.Mode
	Network Network
	// Outbound, Inbound and Tunnel are listening sockets inside the scope. They
	// stay the caller's: the relay duplicates them, sets them non-blocking, and
	// the caller closes its own when the kernel shall stop queueing connections.
	Outbound, Inbound, Tunnel []int
}

func (c *ScopeConfig) check() error {
	if c.Name == "" || c.Network == nil {
		return errors.New("proxy: a scope needs a name and a network")
	}
	return nil
}
