package h1

import (
	"bytes"
	"net/netip"
)

// targetAuthority checks the target's form and returns its authority without an
// empty port, or nil when the form has none.
func (h *Head) targetAuthority() ([]byte, fault) {
	t := h.target()
	switch {
	case h.connect:
		h.Form = AuthorityForm
		if !validAuthority(t) || !hasPort(t) {
			return nil, malformed("CONNECT needs host:port") // RFC 9112 section 3.2.3
		}
		return t, fault{}
	case t[0] == '/':
		h.Form = OriginForm
		return nil, fault{}
	case len(t) == 1 && t[0] == '*':
		h.Form = AsteriskForm
		if h.Method != "OPTIONS" {
			return nil, malformed("asterisk target is for OPTIONS only")
		}
		return nil, fault{}
	}
	h.Form = AbsoluteForm
	scheme, rest, ok := bytes.Cut(t, []byte("://"))
	if !ok || !equalLower(scheme, "http") && !equalLower(scheme, "https") {
		return nil, malformed("request target of no known form")
	}
	authority := rest
	if end := bytes.IndexAny(rest, "/?"); end >= 0 {
		authority = rest[:end]
	}
	if !validAuthority(authority) {
		return nil, malformed("invalid authority in the request target")
	}
	return withoutEmptyPort(authority), fault{}
}

func (h *Head) target() []byte {
	from := len(h.Method) + 1
	return h.raw[from : from+len(h.Target)]
}

// validAuthority reports whether b is host [":" port]. User information, which
// RFC 9110 section 4.2.4 says to treat as an error, percent-encoding and
// sub-delims are refused: they serve to make one reader see another host.
func validAuthority(b []byte) bool {
	host, port := splitPort(b)
	for _, c := range port {
		if !digit(c) {
			return false
		}
	}
	if n, _ := parseLength(port); len(port) > 5 || n > 65535 || len(host) == 0 {
		return false
	}
	if host[0] == '[' {
		return validIPv6(host)
	}
	return all(host, isHost)
}

// splitPort cuts at the colon after the host; port is nil without one.
func splitPort(b []byte) (host, port []byte) {
	i := bytes.LastIndexByte(b, ':')
	if i < 0 || bytes.IndexByte(b[i:], ']') >= 0 {
		return b, nil
	}
	return b[:i], b[i+1:]
}

func hasPort(b []byte) bool {
	_, port := splitPort(b)
	return len(port) > 0
}

func withoutEmptyPort(b []byte) []byte {
	if len(b) > 0 && b[len(b)-1] == ':' {
		return b[:len(b)-1]
	}
	return b
}

// validIPv6 takes no zone: it has a meaning on the sender's host only.
func validIPv6(b []byte) bool {
	if b[len(b)-1] != ']' || bytes.IndexByte(b, '%') >= 0 {
		return false
	}
	addr, err := netip.ParseAddr(view(b[1 : len(b)-1]))
	return err == nil && addr.Is6()
}
