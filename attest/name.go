package attest

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/attest/cgroup"
)

// Names of units and executables become the last segment of a SPIFFE ID, and
// two different names must never become the same segment.
//
// Escaping: letters, digits, '.', '-' and '_' stand for themselves; every other
// byte, a '_' that is followed by '-', and the dots of the names "." and "..",
// are written "_-" and two lower-case hexadecimal digits. So nginx.service is
// "nginx", node_exporter is "node_exporter", getty@tty1.service "getty_-40tty1".
//
// Kinds: what is behind "_-" and no hexadecimal digit cannot come from a name,
// and tells kinds apart:
//
//	NAME              service NAME.service of PID 1, or an executable called
//	                  NAME on a path that only root can change
//	NAME_-program     such an executable when this host has, or once ran, a
//	                  NAME.service
//	NAME_-unverified  an executable whose path somebody else can change
//	NAME_-userUID     service NAME.service of the manager of user UID
//
// A service and an executable can thus share "NAME" only if no such service
// exists on the host: running /usr/sbin/nginx by hand never gives the identity
// of nginx.service.
const (
	markProgram    = "_-program"
	markUnverified = "_-unverified"
	markUser       = "_-user"
)

const hexDigits = "0123456789abcdef"

// Escape writes any name in the characters of a SPIFFE ID path segment
// (SPIFFE-ID section 2.2), injectively. The empty name stays empty, which is no
// valid segment.
func Escape(name string) string {
	var b strings.Builder
	dots := name == "." || name == ".."
	for i := 0; i < len(name); i++ {
		c := name[i]
		if plain(c) && !(c == '.' && dots) && !(c == '_' && i+1 < len(name) && name[i+1] == '-') {
			b.WriteByte(c)
			continue
		}
		b.WriteString("_-")
		b.WriteByte(hexDigits[c>>4])
		b.WriteByte(hexDigits[c&15])
	}
	return b.String()
}

func plain(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '-' || c == '_'
}

// Unescape undoes Escape. Text that Escape does not write is an error.
func Unescape(segment string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(segment); i++ {
		if !strings.HasPrefix(segment[i:], "_-") {
			b.WriteByte(segment[i])
			continue
		}
		if i+3 >= len(segment) {
			return "", errors.New("segment ends inside an escape")
		}
		hi, lo := strings.IndexByte(hexDigits, segment[i+2]), strings.IndexByte(hexDigits, segment[i+3])
		if hi < 0 || lo < 0 {
			return "", fmt.Errorf("segment has an escape %q", segment[i:i+4])
		}
		b.WriteByte(byte(hi<<4 | lo))
		i += 3
	}
	if Escape(b.String()) != segment {
		return "", errors.New("segment is not in its shortest form")
	}
	return b.String(), nil
}

// unitSegment names a service.
func unitSegment(u cgroup.Unit) string {
	if u.Kind == cgroup.User {
		return Escape(u.Short()) + markUser + u.UID
	}
	return Escape(u.Short())
}

// template is the SPIFFE ID of workloads that no entry names.
func (a *Attestor) template(segment string) (spiffeid.ID, error) {
	id, err := spiffeid.FromSegments(a.trustDomain, "ns", a.host, "sa", segment)
	if err == nil && len(id.String()) > maxID {
		err = fmt.Errorf("longer than %d bytes", maxID)
	}
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID for %.300q: %w", segment, err)
	}
	return id, nil
}

// maxID is what every SPIFFE implementation must accept, and none may exceed
// (SPIFFE-ID section 2.3).
const maxID = 2048
