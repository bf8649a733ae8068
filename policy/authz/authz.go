// Package authz holds the words of a decision that several floors share: who
// asks for what, in which mode, and what was decided. Values and small
// interfaces only: nothing here evaluates a policy.
//
// A deny is a Decision, never an error. An error means that no decision could
// be made, and an enforcing caller fails closed.
package authz

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Mode is how far a scope goes in protecting its workloads.
type Mode uint8

const (
	Watch   Mode = iota // connections are recorded; nothing is redirected, decided or changed
	DryRun              // traffic is relayed and decided, nothing is refused
	Enforce             // what is not permitted is refused
)

var modeNames = [...]string{"watch", "dry-run", "enforce"}

func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return "mode(" + strconv.Itoa(int(m)) + ")"
}

// MarshalText writes "watch", "dry-run" or "enforce".
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads "watch", "dry-run" or "enforce".
func (m *Mode) UnmarshalText(text []byte) error {
	for i, name := range modeNames {
		if string(text) == name {
			*m = Mode(i)
			return nil
		}
	}
	return fmt.Errorf("mode %q is none of watch, dry-run, enforce", text)
}

// Effect is the outcome of a decision.
type Effect uint8

const (
	Deny      Effect = iota // refused; the zero value, so that a forgotten decision refuses
	Permit                  // allowed
	WouldDeny               // allowed because of dry-run, recorded as refused
)

var effectNames = [...]string{"deny", "permit", "would_deny"}

func (e Effect) String() string {
	if int(e) < len(effectNames) {
		return effectNames[e]
	}
	return "effect(" + strconv.Itoa(int(e)) + ")"
}

// MarshalText writes "permit", "deny" or "would_deny".
func (e Effect) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// UnmarshalText reads "permit", "deny" or "would_deny".
func (e *Effect) UnmarshalText(text []byte) error {
	for i, name := range effectNames {
		if string(text) == name {
			*e = Effect(i)
			return nil
		}
	}
	return fmt.Errorf("effect %q is none of permit, deny, would_deny", text)
}

// ID names a decision. Conn is drawn once per connection by the agent that
// captured it and travels to the peer's agent, so that both record under it;
// Seq is zero for the connection itself and counts its requests from one.
type ID struct {
	Conn [12]byte
	Seq  uint32
}

// ErrBadID reports text that is not a decision id.
var ErrBadID = errors.New("not a decision id (24 hex digits, optionally -N)")

// NewID draws a fresh connection id from the system's random source.
func NewID() (id ID) {
	_, _ = rand.Read(id.Conn[:]) // never fails: crypto/rand aborts the program instead
	return id
}

// IsZero reports whether no id has been drawn.
func (id ID) IsZero() bool { return id.Conn == [12]byte{} }

// AppendText appends the id as 24 hex digits and, for a request, "-" and its number.
func (id ID) AppendText(b []byte) ([]byte, error) {
	b = hex.AppendEncode(b, id.Conn[:])
	if id.Seq != 0 {
		b = append(b, '-')
		b = strconv.AppendUint(b, uint64(id.Seq), 10)
	}
	return b, nil
}

func (id ID) String() string {
	b, _ := id.AppendText(make([]byte, 0, 36))
	return string(b)
}

// MarshalText writes the id as String does.
func (id ID) MarshalText() ([]byte, error) { return id.AppendText(nil) }

// UnmarshalText reads what String wrote, or returns [ErrBadID].
func (id *ID) UnmarshalText(text []byte) error {
	parsed, err := ParseID(string(text))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}

// ParseID reads what [ID.String] wrote, or returns [ErrBadID].
func ParseID(text string) (ID, error) {
	var id ID
	conn, seq, request := strings.Cut(text, "-")
	if len(conn) != hex.EncodedLen(len(id.Conn)) || strings.ToLower(conn) != conn {
		return ID{}, ErrBadID
	}
	if _, err := hex.Decode(id.Conn[:], []byte(conn)); err != nil {
		return ID{}, ErrBadID
	}
	if request {
		n, err := strconv.ParseUint(seq, 10, 32)
		if err != nil || n == 0 || seq[0] == '0' || seq[0] == '+' {
			return ID{}, ErrBadID
		}
		id.Seq = uint32(n)
	}
	return id, nil
}

// Decision is the answer to one question.
type Decision struct {
	ID     ID
	Effect Effect
	// Policies are the ids of the determining policies, at most a handful; empty when nothing matched.
	Policies []string
	// Reason is one short phrase for the operator, such as "no policy permits it".
	Reason string
	// Unauthenticated says that the refused caller showed no valid identity
	// where one might have been permitted: HTTP answers 401, not 403.
	Unauthenticated bool
}

// Allowed reports whether traffic may go on: a permit, or a dry-run deny.
func (d Decision) Allowed() bool { return d.Effect != Deny }

// Side is which end of a connection decides.
type Side uint8

const (
	Egress  Side = iota // beside the caller
	Ingress             // beside the service; its word on HTTP is final
	Local               // both ends on this agent: one decision for both
)

func (s Side) String() string {
	switch s {
	case Ingress:
		return "ingress"
	case Local:
		return "local"
	default:
		return "egress"
	}
}

// MarshalText writes "egress", "ingress" or "local".
func (s Side) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads "egress", "ingress" or "local".
func (s *Side) UnmarshalText(text []byte) error {
	for _, side := range []Side{Egress, Ingress, Local} {
		if string(text) == side.String() {
			*s = side
			return nil
		}
	}
	return fmt.Errorf("side %q is none of egress, ingress, local", text)
}

// Peer is the calling side of a connection.
type Peer struct {
	// ID is the verified SPIFFE ID: by this agent's attestation at egress, by
	// the peer's certificate at ingress. Zero means not authenticated.
	ID spiffeid.ID
	// Addr is the caller's address, never in v4-mapped form.
	Addr netip.AddrPort
	// Unit, Exe, PID and UID are set where the caller is on this node.
	Unit string
	Exe  string
	PID  uint32
	UID  uint32
}

// Service is the called side of a connection.
type Service struct {
	// ID is the SPIFFE ID of the workload that owns the port; zero when it is
	// not known (a peer without an agent, or not asked yet).
	ID spiffeid.ID
	// Addr is the original destination, never in v4-mapped form.
	Addr netip.AddrPort
}

// Connection is what is known of a connection when it is to be decided.
type Connection struct {
	// ID is the decision id to record under. Its Seq is zero.
	ID          ID
	Scope       string
	Mode        Mode
	Side        Side
	Source      Peer
	Destination Service
	// Mesh reports that the peer's agent is at the other end of a mutual TLS tunnel
	// (or that both ends are on this agent); false for plaintext.
	Mesh bool
}

// Request is one HTTP request to decide. The strings are valid only during the call.
type Request struct {
	Method string // as sent, case-sensitive (RFC 9110 section 9.1)
	Target string // request target as sent
	Host   string // authority without userinfo, lower case, port kept if given
	// Upgrade is the lower-case upgrade token asked for, empty for none.
	Upgrade string
}

// Session decides one connection and the requests on it. It is used by one
// goroutine at a time. Every decision is recorded by the session itself.
type Session interface {
	// Connect decides the connection. Asking again evaluates the newest policies
	// anew, for live connections after a reload; only a changed outcome is recorded again.
	Connect() (Decision, error)
	// Request decides one HTTP request on one immutable policy snapshot.
	Request(r *Request) (Decision, error)
	// HTTPOnly reports whether the service can be the subject of an HTTP policy,
	// so that only permitted HTTP requests may reach it.
	HTTPOnly() bool
	// Refuse records a refusal that was not a policy's, such as bytes that are
	// not HTTP on an HTTP-only service. In an enforcing scope it returns Deny, else WouldDeny.
	Refuse(reason string) Decision
}
