package h1

import "bytes"

// fault is why bytes are refused: a status and a fixed phrase. The zero value
// means that nothing is wrong.
type fault struct {
	status int
	reason string
}

func (f fault) bad() bool { return f.status != 0 }

func malformed(reason string) fault { return fault{400, reason} }

func tooLarge(reason string) fault { return fault{431, reason} }

// line is one field line as offsets into its head: the name, the value without
// the whitespace around it, and where the next line begins.
type line struct {
	start, nameEnd, value, valueEnd, end int32
}

// scanner looks for the end of a head. It remembers how far it has looked, so
// that a head that comes octet by octet costs no more than one that comes whole.
type scanner struct {
	seen  int // octets looked at
	begin int // where the line being looked at begins
	lines int // complete lines
}

// scan returns the head's length, zero when it is not complete.
func (s *scanner) scan(in []byte, maxHead, maxFields int) (int, fault) {
	for {
		i := bytes.IndexByte(in[s.seen:], '\n')
		if i < 0 {
			s.seen = len(in)
			if len(in) >= maxHead {
				return 0, tooLarge("message head too large")
			}
			return 0, fault{}
		}
		i += s.seen
		if f := s.endLine(in, i, maxHead, maxFields); f.bad() {
			return 0, f
		}
		if s.begin == i-1 {
			return i + 1, fault{}
		}
		s.begin = s.seen
	}
}

// endLine checks the line that the LF at i ends.
func (s *scanner) endLine(in []byte, i, maxHead, maxFields int) fault {
	s.seen = i + 1
	switch {
	case i >= maxHead:
		return tooLarge("message head too large")
	case i == s.begin || in[i-1] != '\r':
		// RFC 9112 section 2.2 lets a recipient take a bare LF for a line end.
		// That is exactly how two recipients come to see two different heads.
		return malformed("line ends without CR")
	case i-1 == s.begin && s.lines == 0:
		return malformed("empty line before the message")
	case i-1 > s.begin:
		s.lines++
	}
	if s.lines > maxFields+1 {
		return tooLarge("too many header lines")
	}
	return fault{}
}

// parseFields appends the field lines of head, which scan has measured, from
// the offset where its first line ended.
func parseFields(head []byte, from int, lines []line) ([]line, fault) {
	for p := from; p < len(head)-2; {
		end := p + bytes.IndexByte(head[p:], '\n') + 1
		l, f := parseField(head, p, end)
		if f.bad() {
			return lines, f
		}
		lines = append(lines, l)
		p = end
	}
	return lines, fault{}
}

// parseField reads the field line head[p:end], which ends in CRLF.
func parseField(head []byte, p, end int) (line, fault) {
	colon := p
	for class[head[colon]]&isToken != 0 {
		colon++ // ends at the CR at the latest
	}
	if colon == p || head[colon] != ':' {
		return line{}, nameFault(head, p, colon)
	}
	v, e := colon+1, end-2
	for head[v] == ' ' || head[v] == '\t' {
		v++ // likewise
	}
	for e > v && (head[e-1] == ' ' || head[e-1] == '\t') {
		e--
	}
	if !validValue(head[v:e]) {
		return line{}, malformed("control character in a header value")
	}
	return line{int32(p), int32(colon), int32(v), int32(e), int32(end)}, fault{}
}

func nameFault(head []byte, p, stop int) fault {
	space := head[stop] == ' ' || head[stop] == '\t'
	switch {
	case space && stop == p:
		// RFC 9112 section 5.2 allows to unfold or to refuse; servers differ in both.
		return malformed("folded header line")
	case space:
		return malformed("space in or after a header name") // RFC 9112 section 5.1
	}
	return malformed("invalid header name")
}
