package policy

import (
	"errors"
	"strings"

	"github.com/cedar-policy/cedar-go"

	"ringfence.dev/policy/authz"
)

// What a request is refused for before any policy is asked.
var (
	errMethod    = errors.New("the method is not a token")
	errTarget    = errors.New("the request target has none of the forms of RFC 9112 section 3.2")
	errAuthority = errors.New("the authority is malformed")
	errConflict  = errors.New("the target's authority differs from the Host field")
	errUpgrade   = errors.New("the upgrade is to an unknown protocol")
)

// maxSegments is how many path segments have an attribute of their own. It
// is the schema's s0 to s7; endpoint templates are not bound by it.
const maxSegments = 8

var segmentNames = [maxSegments]cedar.String{"s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"}

// mapped is an HTTP request in the words of the schema.
type mapped struct {
	action   cedar.EntityUID
	method   string
	path     string // canonical; "*" for OPTIONS *, "" for CONNECT
	segments []string
	host     string
	upgrade  string
}

// mapRequest reads a request target in each of its four forms (RFC 9112
// section 3.2) and brings it into canonical form. An error says why no policy can
// speak about the request.
func mapRequest(r *authz.Request, separators bool) (mapped, error) {
	m := mapped{action: words.method(r.Method), method: r.Method, upgrade: r.Upgrade}
	if !isToken(r.Method) {
		return m, errMethod
	}
	// After a switch of protocols nothing more is decided, so that only those
	// pass whose messages are not requests in another clothing. h2c is one of these.
	if r.Upgrade != "" && r.Upgrade != "websocket" {
		return m, errUpgrade
	}
	authority, path, err := splitTarget(r.Method, r.Target)
	if err != nil {
		return m, err
	}
	if m.host, err = hostOf(r.Host); err != nil {
		return m, err
	}
	if authority != "" {
		// RFC 9112 section 3.2.2: the target wins over the Host field. A server that thinks otherwise
		// would serve another site than the one decided about.
		host, err := hostOf(authority)
		if err != nil {
			return m, err
		}
		if r.Host != "" && host != m.host {
			return m, errConflict
		}
		m.host = host
	}
	if path == "" || path == "*" {
		m.path = path
		return m, nil
	}
	if m.path, err = canonicalPath(path, separators); err != nil {
		return m, err
	}
	m.segments = splitPath(m.path)
	return m, nil
}

// splitTarget takes a request target apart. The query is left out: what its
// parameters mean is the server's own affair, and policy could only guess.
func splitTarget(method, target string) (authority, path string, err error) {
	switch {
	case method == "CONNECT":
		if target == "" || strings.ContainsAny(target, "/?#") {
			return "", "", errTarget
		}
		return target, "", nil
	case target == "*":
		if method != "OPTIONS" {
			return "", "", errTarget
		}
		return "", "*", nil
	case strings.HasPrefix(target, "/"):
		path, _, _ = strings.Cut(target, "?")
		return "", path, nil
	}
	scheme, rest, ok := strings.Cut(target, "://")
	if !ok || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
		return "", "", errTarget
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	authority, path = rest[:end], rest[end:]
	if authority == "" {
		return "", "", errAuthority
	}
	path, _, _ = strings.Cut(path, "?")
	switch {
	case path != "":
	case method == "OPTIONS" && end == len(rest):
		path = "*" // RFC 9112 section 3.2.4
	default:
		path = "/"
	}
	return authority, path, nil
}

// hostOf returns the host of an authority in lower case, without port,
// brackets and the root's dot. Userinfo and percent-encoding are refused: RFC 9110 section 4.2.4
// advises so, and servers do not agree on what they name.
func hostOf(authority string) (string, error) {
	for i := range len(authority) {
		c := authority[i]
		if !pchar[c] && c != '[' && c != ']' || c == '@' {
			return "", errAuthority
		}
	}
	host := authority
	if strings.HasPrefix(host, "[") {
		end := strings.IndexByte(host, ']')
		if end < 0 || end+1 < len(host) && host[end+1] != ':' || !digits(strings.TrimPrefix(host[end+1:], ":")) {
			return "", errAuthority
		}
		return strings.ToLower(host[1:end]), nil
	}
	host, port, _ := strings.Cut(host, ":")
	if strings.ContainsAny(host, "[]") || !digits(port) {
		return "", errAuthority
	}
	return strings.ToLower(strings.TrimSuffix(host, ".")), nil
}

func digits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return len(s) <= 5
}

// isToken reports whether s is a token of RFC 9110 section 5.6.2.
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' ||
			strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return false
		}
	}
	return s != ""
}

// context builds the schema's HTTPContext from the connection's part and the
// request. Segments, which cost as much as all the rest, may be left out where no policy that
// is asked looks at them.
func (m *mapped) context(src, mesh cedar.Value, withSegments bool) cedar.Record {
	request := cedar.RecordMap{
		"method":   cedar.String(m.method),
		"path":     cedar.String(m.path),
		"segments": cedar.Record{},
		"host":     cedar.String(m.host),
	}
	if withSegments {
		request["segments"] = m.segmentRecord()
	}
	if m.upgrade != "" {
		request["upgrade"] = cedar.String(m.upgrade)
	}
	return cedar.NewRecord(cedar.RecordMap{
		"src_ip":  src,
		"mesh":    mesh,
		"request": cedar.NewRecord(request),
	})
}

func (m *mapped) segmentRecord() cedar.Record {
	segments := make(cedar.RecordMap, maxSegments+1)
	segments["count"] = cedar.Long(len(m.segments))
	for i, name := range segmentNames {
		seg := ""
		if i < len(m.segments) {
			seg = m.segments[i]
		}
		segments[name] = cedar.String(seg)
	}
	return cedar.NewRecord(segments)
}
