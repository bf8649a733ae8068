package policy

import (
	"bytes"
	"errors"
	"strings"
)

// What a path is refused for. The texts are short phrases for the operator.
var (
	errPathForm      = errors.New("the path does not begin with a slash")
	errPathByte      = errors.New("the path holds a control character, a fragment or a backslash")
	errPathPercent   = errors.New("the path holds invalid percent-encoding")
	errPathNUL       = errors.New("the path holds %00")
	errPathOverlong  = errors.New("the path holds an overlong UTF-8 sequence")
	errPathSeparator = errors.New("the path holds an encoded slash or backslash")
	errPathClimbs    = errors.New("the path climbs above its root")
	errPathAmbiguous = errors.New("the path has dot segments that servers resolve differently")
)

// canonicalPath brings the path of a request target (without its query) into
// the one form that policy sees. Two paths that a server may take for the same
// have the same form; where servers differ, the path is refused.
//
//   - Percent-encoding is undone once, and put back, in upper case, for what
//     RFC 3986 does not allow bare in a segment (pchar, section 3.3). Sections 2.2 and 6.2.2.2
//     would keep an encoded ';' apart from a bare one; servers do not.
//   - Empty and dot segments go (section 5.2.4), a trailing slash stays.
//   - A raw backslash and %00 are refused, and so are %2F and %5C unless separators is
//     set, which keeps them as a part of their segment.
//   - Climbing above the root is refused, and so is a path with both empty and double-dot
//     segments ("/a//../b" is /b for some servers, /a/b for others), and a
//     dot segment in disguise ("/..;x/", which some servers strip to "/../").
//
// The result is ASCII, and its own canonical form.
func canonicalPath(raw string, separators bool) (string, error) {
	if raw == "" || raw[0] != '/' {
		return "", errPathForm
	}
	out := append(make([]byte, 0, len(raw)+8), '/')
	start := 1 // of the current segment in out
	var empty, up bool
	for i := 1; ; {
		if i < len(raw) && raw[i] != '/' {
			c, n, err := pathOctet(raw[i:], separators)
			if err != nil {
				return "", err
			}
			out = appendOctet(out, c)
			i += n
			continue
		}
		last := i == len(raw)
		switch seg := out[start:]; {
		case len(seg) == 0:
			empty = empty || !last
		case string(seg) == ".":
			out = out[:start]
		case string(seg) == "..":
			up = true
			if start == 1 {
				return "", errPathClimbs
			}
			start = bytes.LastIndexByte(out[:start-1], '/') + 1
			out = out[:start]
		case disguised(string(seg)):
			return "", errPathAmbiguous
		case !last:
			out = append(out, '/')
			start = len(out)
		}
		if last {
			break
		}
		i++
	}
	if empty && up {
		return "", errPathAmbiguous
	}
	return string(out), nil
}

// pathOctet decodes the octet s begins with and tells how many bytes it took.
func pathOctet(s string, separators bool) (c byte, n int, err error) {
	if c = s[0]; c != '%' {
		if c < 0x20 || c == 0x7f || c == '\\' || c == '#' || c == '?' || c == ' ' {
			return 0, 0, errPathByte
		}
		return c, 1, overlong(c)
	}
	if len(s) < 3 {
		return 0, 0, errPathPercent
	}
	hi, lo := unhex(s[1]), unhex(s[2])
	if hi > 15 || lo > 15 {
		return 0, 0, errPathPercent
	}
	switch c = hi<<4 | lo; {
	case c == 0:
		return 0, 0, errPathNUL
	case (c == '/' || c == '\\') && !separators:
		return 0, 0, errPathSeparator
	}
	return c, 3, overlong(c)
}

// overlong refuses the two octets that UTF-8 never holds and that begin the
// long forms of ASCII, which careless decoders take for a slash or a dot
// (RFC 3629 section 10).
func overlong(c byte) error {
	if c == 0xc0 || c == 0xc1 {
		return errPathOverlong
	}
	return nil
}

func unhex(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 0xff
}

// pchar marks what stands bare in a path segment (RFC 3986 section 3.3).
var pchar = func() (set [256]bool) {
	for c := range 256 {
		set[c] = '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
	}
	for _, c := range []byte("-._~!$&'()*+,;=:@") {
		set[c] = true
	}
	return set
}()

func appendOctet(out []byte, c byte) []byte {
	if pchar[c] {
		return append(out, c)
	}
	const digits = "0123456789ABCDEF"
	return append(out, '%', digits[c>>4], digits[c&15])
}

// disguised reports whether a server that cuts path parameters, or that
// decodes separators, could find a dot segment in seg.
func disguised(seg string) bool {
	if !strings.Contains(seg, ".") {
		return false
	}
	seg = strings.ReplaceAll(seg, "%5C", "%2F")
	for part := range strings.SplitSeq(seg, "%2F") {
		name, _, _ := strings.Cut(part, ";")
		if name == "." || name == ".." {
			return true
		}
	}
	return false
}
