// Package decisionlog keeps a record of every decision: as JSON lines in a file, and
// the newest of them in memory, where "why was that refused?" is answered from.
//
// It writes what it is given and decides nothing. The invariant: recording never
// blocks traffic. What cannot be stored in time is counted and reported to
// the one who recorded it, who knows whether traffic may go on without.
package decisionlog

import (
	"net/netip"
	"strconv"
	"time"
	"unicode/utf8"

	"ringfence.dev/policy/authz"
)

// Record is one decision. Its strings may be borrowed: nothing is kept past the call
// that records it. Text of a peer's choice is cut to a bounded length.
type Record struct {
	Time   time.Time    `json:"time"`
	ID     authz.ID     `json:"id"`
	Scope  string       `json:"scope"`
	Side   authz.Side   `json:"side"`
	Mode   authz.Mode   `json:"mode"`
	Effect authz.Effect `json:"effect"`

	// Principal is the caller's SPIFFE ID, or "anonymous".
	Principal   string         `json:"principal"`
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	// Set where the caller is on this node.
	Unit string `json:"unit,omitempty"`
	Exe  string `json:"exe,omitempty"`
	PID  uint32 `json:"pid,omitempty"`
	UID  uint32 `json:"uid,omitempty"`
	// Mesh tells mutual TLS (or both ends on this node) from plaintext.
	Mesh bool `json:"mesh"`

	// Action is the id of the Cedar action; "refuse" for what was refused
	// before any policy was asked.
	Action string `json:"action"`
	// Resource is the id of the Cedar resource: a SPIFFE ID or address:port.
	Resource string `json:"resource"`
	// Set for HTTP requests. Path is canonical and without query; as sent, without
	// query, where Action is "refuse"; empty when it has no canonical form and nobody needs one.
	Method  string `json:"method,omitempty"`
	Host    string `json:"host,omitempty"`
	Path    string `json:"path,omitempty"`
	Upgrade string `json:"upgrade,omitempty"`

	Policies []string `json:"policies,omitempty"`
	Reason   string   `json:"reason"`
	// What the policies in dry-run would have made of it, if something else.
	DryRunEffect   string   `json:"dry_run_effect,omitempty"` // "permit" or "deny"
	DryRunPolicies []string `json:"dry_run_policies,omitempty"`
	// Version is the policy snapshot that decided.
	Version string `json:"version"`
}

// maxText bounds each text of a record, in bytes before escaping. Paths may be
// as long as a request's head; what identifies them comes first.
const maxText = 1024

// appendRecord appends r as one JSON object and a newline. It allocates only to grow b.
func appendRecord(b []byte, r *Record) []byte {
	b = append(b, `{"time":"`...)
	b = r.Time.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","id":"`...)
	b, _ = r.ID.AppendText(b) // never fails
	b = append(b, '"')
	b = member(b, "scope", r.Scope)
	b = member(b, "side", r.Side.String())
	b = member(b, "mode", r.Mode.String())
	b = member(b, "effect", r.Effect.String())
	b = member(b, "principal", r.Principal)
	b = address(b, "source", r.Source)
	b = address(b, "destination", r.Destination)
	b = optional(b, "unit", r.Unit)
	b = optional(b, "exe", r.Exe)
	if r.PID != 0 {
		b = number(b, "pid", r.PID)
		b = number(b, "uid", r.UID)
	}
	b = append(b, `,"mesh":`...)
	b = strconv.AppendBool(b, r.Mesh)
	b = member(b, "action", r.Action)
	b = member(b, "resource", r.Resource)
	b = optional(b, "method", r.Method)
	b = optional(b, "host", r.Host)
	b = optional(b, "path", r.Path)
	b = optional(b, "upgrade", r.Upgrade)
	b = list(b, "policies", r.Policies)
	b = member(b, "reason", r.Reason)
	b = optional(b, "dry_run_effect", r.DryRunEffect)
	b = list(b, "dry_run_policies", r.DryRunPolicies)
	b = member(b, "version", r.Version)
	return append(b, '}', '\n')
}

func name(b []byte, key string) []byte {
	b = append(b, ',', '"')
	b = append(b, key...)
	return append(b, '"', ':')
}

func member(b []byte, key, value string) []byte { return appendString(name(b, key), value) }

func optional(b []byte, key, value string) []byte {
	if value == "" {
		return b
	}
	return member(b, key, value)
}

func number(b []byte, key string, n uint32) []byte {
	return strconv.AppendUint(name(b, key), uint64(n), 10)
}

func address(b []byte, key string, a netip.AddrPort) []byte {
	b = append(name(b, key), '"')
	if a.IsValid() {
		b = netip.AddrPortFrom(a.Addr().WithZone(""), a.Port()).AppendTo(b)
	}
	return append(b, '"')
}

func list(b []byte, key string, values []string) []byte {
	if len(values) == 0 {
		return b
	}
	b = append(name(b, key), '[')
	for i, v := range values {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, v)
	}
	return append(b, ']')
}

// appendString appends s as a JSON string (RFC 8259 section 7). Besides what JSON demands it
// escapes all that could act on a terminal or break a line for a reader: C1 controls
// and DEL, line and paragraph separators, and the marks that reorder text. Invalid
// UTF-8 becomes U+FFFD.
func appendString(b []byte, s string) []byte {
	if len(s) > maxText {
		s = s[:maxText]
		for len(s) > 0 && !utf8.RuneStart(s[len(s)-1]) {
			s = s[:len(s)-1]
		}
		if n := len(s); n > 0 && s[n-1] >= utf8.RuneSelf {
			s = s[:n-1] // the first octet of a cut character
		}
	}
	b = append(b, '"')
	from := 0
	for i := 0; i < len(s); {
		if c := s[i]; c < utf8.RuneSelf {
			if c >= 0x20 && c != '"' && c != '\\' && c != 0x7f {
				i++
				continue
			}
			b = append(b, s[from:i]...)
			b = escape(b, rune(c))
			i++
			from = i
			continue
		}
		c, size := utf8.DecodeRuneInString(s[i:])
		if c != utf8.RuneError && !acts(c) {
			i += size
			continue
		}
		b = append(b, s[from:i]...)
		b = escape(b, c)
		i += size
		from = i
	}
	b = append(b, s[from:]...)
	return append(b, '"')
}

// acts reports whether a character above ASCII does something instead of being shown.
func acts(c rune) bool {
	return c >= 0x80 && c < 0xa0 || c >= 0x2028 && c <= 0x202e ||
		c >= 0x2060 && c <= 0x2069 || c == 0x200e || c == 0x200f || c == 0xfeff
}

func escape(b []byte, c rune) []byte {
	const digits = "0123456789abcdef"
	switch c {
	case '"', '\\':
		return append(b, '\\', byte(c))
	case '\n':
		return append(b, '\\', 'n')
	case '\r':
		return append(b, '\\', 'r')
	case '\t':
		return append(b, '\\', 't')
	}
	return append(b, '\\', 'u', digits[c>>12&15], digits[c>>8&15], digits[c>>4&15], digits[c&15])
}
