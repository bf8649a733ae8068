package h1

import (
	"encoding/binary"
	"unsafe"
)

const (
	isToken  = 1 << iota // tchar, RFC 9110 section 5.6.2
	isTarget             // octets of a request target: visible ASCII but '#'
	isHost               // octets of a registered name, without percent-encoding and sub-delims
)

var (
	class = makeClasses()
	folds = makeFolds()
)

func makeClasses() (t [256]uint8) {
	for c := 0x21; c < 0x7f; c++ {
		t[c] |= isTarget
	}
	// A fragment never belongs into a request (RFC 9112 section 3.2); servers
	// disagree on whether it ends the path, and rules on paths are evaded by it.
	t['#'] &^= isTarget
	mark := func(set string, bit uint8) {
		for i := range len(set) {
			t[set[i]] |= bit
		}
	}
	const alnum = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	mark(alnum+"!#$%&'*+-.^_`|~", isToken)
	mark(alnum+"-._~", isHost)
	return t
}

// makeFolds maps letters to lower case, digits to themselves, and everything
// else to a hyphen, as CGI-style servers fold names: they see X_Forwarded_For
// and X.Forwarded.For as X-Forwarded-For.
func makeFolds() (t [256]byte) {
	for c := range t {
		b := byte(c)
		switch {
		case 'A' <= b && b <= 'Z':
			b += 'a' - 'A'
		case 'a' <= b && b <= 'z', '0' <= b && b <= '9':
		default:
			b = '-'
		}
		t[c] = b
	}
	return t
}

// foldsTo reports whether name folds to folded, which has its own length.
func foldsTo(name []byte, folded string) bool {
	if len(name) != len(folded) {
		return false
	}
	for i, c := range name {
		if folds[c] != folded[i] {
			return false
		}
	}
	return true
}

// equalLower compares ASCII without case; lower is in lower case.
func equalLower[T []byte | string](s T, lower string) bool {
	if len(s) != len(lower) {
		return false
	}
	for i := range len(s) {
		if toLower(s[i]) != lower[i] {
			return false
		}
	}
	return true
}

func toLower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

func all(b []byte, bit uint8) bool {
	for _, c := range b {
		if class[c]&bit == 0 {
			return false
		}
	}
	return true
}

// validValue reports whether b has no control octets but HTAB (RFC 9110 section
// 5.5). It looks at eight octets at a time, since values are most of a head.
func validValue(b []byte) bool {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	for len(b) >= 8 {
		x := binary.LittleEndian.Uint64(b)
		del := x ^ 0x7f*ones
		if ((x-0x20*ones)&^x|(del-ones)&^del)&high != 0 && !plainValue(b[:8]) {
			return false
		}
		b = b[8:]
	}
	return plainValue(b)
}

func plainValue(b []byte) bool {
	for _, c := range b {
		if c < 0x20 && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// view is b as a string without a copy, for use while b does not change.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}
