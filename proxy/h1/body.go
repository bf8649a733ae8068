package h1

import "bytes"

// bodyKind is where in a body the next octet belongs.
type bodyKind uint8

const (
	noBody    bodyKind = iota // at a message head
	counted                   // left octets
	chunkSize                 // at a chunk-size line
	chunkData                 // left octets of a chunk
	chunkEnd                  // at the CRLF after a chunk
	trailers                  // at a trailer line or the empty line
	untilEOF                  // up to the end of the stream
)

// body walks through message bodies.
type body struct {
	kind    bodyKind
	left    int64
	trailer int // octets of trailer lines so far
}

func (b *body) begin(kind bodyKind, length int64) { *b = body{kind: kind, left: length} }

// limits is what a body is held against.
type limits struct {
	trailer int
	strip   *Names // trailers to take out
	more    *Names // likewise, of this request
	request bool   // check the trailers as a client's
}

// advance takes as much of the body from s as there is. It leaves b.kind at
// noBody when the body is complete. progress is false when what is left is
// too little to go on.
func (b *body) advance(s *step, lim *limits) (progress bool, f fault) {
	switch b.kind {
	case counted, chunkData:
		return b.data(s), fault{}
	case chunkSize:
		return b.size(s)
	case chunkEnd:
		return b.dataEnd(s)
	case trailers:
		return b.trailerLine(s, lim)
	case untilEOF:
		s.pos = len(s.in)
		return false, fault{}
	}
	return true, fault{}
}

func (b *body) data(s *step) (progress bool) {
	n := min(b.left, int64(len(s.in)-s.pos))
	b.left -= n
	s.pos += int(n)
	if b.left > 0 {
		return false
	}
	if b.kind == chunkData {
		b.kind = chunkEnd
	} else {
		b.kind = noBody
	}
	return true
}

// size reads a chunk-size line: digits, then extensions (RFC 9112 section 7.1).
// Only CRLF ends it, and nothing may stand between the digits and a semicolon.
func (b *body) size(s *step) (progress bool, f fault) {
	rest := s.rest()
	end := bytes.IndexByte(rest[:min(len(rest), maxChunkLine)], '\n')
	if end < 0 {
		if len(rest) >= maxChunkLine {
			return false, malformed("chunk-size line too long")
		}
		return false, fault{}
	}
	if end == 0 || rest[end-1] != '\r' {
		return false, malformed("chunk-size line ends without CR")
	}
	n, digits := parseSize(rest)
	ext := rest[digits : end-1]
	if digits == 0 || digits > maxSizeDigits {
		return false, malformed("invalid chunk size")
	}
	if len(ext) > 0 && ext[0] != ';' || !validValue(ext) {
		return false, malformed("invalid chunk extension")
	}
	s.pos += end + 1
	b.left, b.kind = n, chunkData
	if n == 0 {
		b.kind = trailers
	}
	return true, fault{}
}

func parseSize(b []byte) (n int64, digits int) {
	for digits = 0; digits < len(b) && digits <= maxSizeDigits; digits++ {
		c := toLower(b[digits])
		switch {
		case digit(c):
			n = n<<4 | int64(c-'0')
		case 'a' <= c && c <= 'f':
			n = n<<4 | int64(c-'a'+10)
		default:
			return n, digits
		}
	}
	return n, digits
}

func (b *body) dataEnd(s *step) (progress bool, f fault) {
	rest := s.rest()
	switch {
	case len(rest) > 0 && rest[0] != '\r', len(rest) > 1 && rest[1] != '\n':
		return false, malformed("chunk longer than its size")
	case len(rest) < 2:
		return false, fault{}
	}
	s.pos += 2
	b.kind = chunkSize
	return true, fault{}
}

// trailerLine takes one line of the trailer section, so that a line to remove is
// never forwarded and no line waits for the next.
func (b *body) trailerLine(s *step, lim *limits) (progress bool, f fault) {
	rest := s.rest()
	end := bytes.IndexByte(rest, '\n') + 1
	if end == 0 {
		if b.trailer+len(rest) >= lim.trailer {
			return false, tooLarge("trailers too large")
		}
		return false, fault{}
	}
	if b.trailer += end; b.trailer > lim.trailer {
		return false, tooLarge("trailers too large")
	}
	if end == 1 || rest[end-2] != '\r' {
		return false, malformed("trailer ends without CR")
	}
	if end == 2 {
		s.pos += 2
		b.kind = noBody
		return true, fault{}
	}
	return true, b.trailerField(s, end, lim)
}

func (b *body) trailerField(s *step, end int, lim *limits) fault {
	rest := s.rest()
	l, f := parseField(rest, 0, end)
	if f.bad() {
		return f
	}
	name := rest[:l.nameEnd]
	switch {
	case lim.request && essential.Has(name):
		// RFC 9110 section 6.5.1: a server that merges trailers into the head would frame anew.
		return malformed("trailer may not frame or route")
	case lim.strip.Has(name) || lim.more.Has(name):
		s.drop(end)
	default:
		s.pos += end
	}
	return fault{}
}
