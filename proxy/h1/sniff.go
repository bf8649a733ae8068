package h1

import "strings"

// methods are those of IANA's HTTP Method Registry. Only what can still begin
// with one of them is held back: no other protocol's first word is.
const methods = " ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT CONNECT COPY DELETE GET HEAD LABEL LINK LOCK" +
	" MERGE MKACTIVITY MKCALENDAR MKCOL MKREDIRECTREF MKWORKSPACE MOVE OPTIONS ORDERPATCH PATCH POST" +
	" PROPFIND PROPPATCH PUT QUERY REBIND REPORT SEARCH TRACE UNBIND UNCHECKOUT UNLINK UNLOCK UPDATE" +
	" UPDATEREDIRECTREF VERSION-CONTROL "

const longestMethod = len("UPDATEREDIRECTREF")

// preface is what an HTTP/2 client begins with, and nobody else: it is sent as
// one, and an HTTP/1 server that took it for requests would end at the second
// of them (RFC 9113 section 3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// maxSniff is how many octets may come before the first line has shown what it
// is. Servers that read longer request lines than 1 MiB are not known.
const maxSniff = 1 << 20

// finding is what a connection's first octets say.
type finding uint8

const (
	undecided finding = iota
	notHTTP
	isHTTP // a server may take it for a request, be it a valid one or not
)

// firstLine reads a connection's first line as the most lenient servers do: after
// any empty lines, words between any blanks (RFC 9112 sections 2.2 and 3), of
// which the last names HTTP. It keeps no octets but the method's, so that
// looking on costs nothing while they pass.
type firstLine struct {
	seen   int // octets looked at
	word   [longestMethod + 1]byte
	length uint8 // of the first word in word; that of a longer one is len(word)
	words  uint8 // begun so far, at most 4
	agrees uint8 // how many octets of the last word agree with "http/"
	inWord bool  // the last octet belongs to a word
	cr     bool  // the last octet is a CR
	loose  bool  // a valid request line does not look like this
	next   uint8 // what is looked at of the line behind it
}

const differs = 255 // for agrees

const (
	nothing = iota // the first line is not over
	nextStart
	nextName
	nextBlank // between a header's name and its colon
)

// look takes the next octets. After a finding it must not be called again; seen
// then counts the octets up to and with the one that decided.
func (f *firstLine) look(b []byte) finding {
	for _, c := range b {
		f.seen++
		found := undecided
		switch {
		case f.next != nothing:
			found = f.nextLine(c)
		case c == '\n':
			found = f.endOfLine()
		case blank(c):
			found = f.blank(c)
		default:
			found = f.octet(c)
		}
		if found != undecided {
			return found
		}
	}
	// Empty lines are passed over without end: nginx does so too.
	if f.seen > maxSniff && f.words > 0 {
		return notHTTP
	}
	return undecided
}

// blank reports whether some server takes c for white space: beside ASCII's,
// Python's str.split takes the separators and, in Latin-1, NEL and NBSP.
func blank(c byte) bool {
	return c == ' ' || '\t' <= c && c <= '\r' || 0x1c <= c && c <= 0x1f || c == 0x85 || c == 0xa0
}

func (f *firstLine) blank(c byte) finding {
	if f.cr && f.request() {
		return isHTTP // a bare CR ends a line for some
	}
	valid := f.inWord && (c == ' ' && f.words < 3 || c == '\r' && f.request())
	f.loose = f.loose || !valid
	f.inWord, f.cr = false, c == '\r'
	return undecided
}

func (f *firstLine) octet(c byte) finding {
	if f.cr {
		if f.request() {
			return isHTTP
		}
		f.loose = true
	}
	f.cr = false
	if !f.inWord {
		f.inWord, f.agrees = true, 0
		f.words = min(f.words+1, 4)
	}
	f.match(c)
	switch {
	case f.words == 1 && class[c]&isToken == 0:
		return notHTTP
	case f.words == 1 && int(f.length) < len(f.word):
		f.word[f.length] = c
		f.length++
	case f.words == 2 && class[c]&isTarget == 0, f.words == 3 && f.agrees == differs, f.words > 3:
		f.loose = true
	}
	return undecided
}

func (f *firstLine) match(c byte) {
	const version = "http/"
	switch {
	case f.agrees == differs || int(f.agrees) == len(version):
	case toLower(c) == version[f.agrees]:
		f.agrees++
	default:
		f.agrees = differs
	}
}

// request reports whether the words so far make a request. A blank within the
// target, which some servers let pass, counts behind a registered method only:
// lines of a log may end in HTTP/1.1 as well.
func (f *firstLine) request() bool {
	return int(f.agrees) == len("http/") && (f.words == 3 || f.words > 3 && f.registered())
}

// endOfLine judges the line. One of a registered method and no version may be a
// request of HTTP/0.9, which has no header; some servers read one nevertheless.
func (f *firstLine) endOfLine() finding {
	switch {
	case f.words == 0:
		f.loose, f.cr = true, false // an empty line before the first
		return undecided
	case f.request():
		return isHTTP
	case f.words == 2 && f.registered():
		f.next, f.loose = nextStart, true
		return undecided
	}
	return notHTTP
}

// nextLine looks whether a header line follows: a name, maybe blanks, a colon.
func (f *firstLine) nextLine(c byte) finding {
	switch {
	case class[c]&isToken != 0 && f.next != nextBlank:
		f.next = nextName
	case f.next == nextStart:
		return notHTTP
	case c == ' ' || c == '\t':
		f.next = nextBlank
	case c == ':':
		return isHTTP
	default:
		return notHTTP
	}
	return undecided
}

// registered reports whether the first word is a registered method, or the
// beginning of one if more of it may come.
func (f *firstLine) registered() bool {
	var b [1 + longestMethod + 2]byte
	b[0] = ' '
	n := 1 + copy(b[1:], f.word[:f.length])
	if f.words > 1 || !f.inWord {
		b[n] = ' '
		n++
	}
	return n > 1 && strings.Contains(methods, view(b[:n]))
}

// is reports whether the first word is that.
func (f *firstLine) is(word string) bool { return f.words > 1 && view(f.word[:f.length]) == word }

// holds reports whether the octets so far can still become the valid request
// line of a registered method.
func (f *firstLine) holds() bool { return !f.loose && f.registered() }

// couldBeLine reports whether a line can still become a request line with the
// octets b, which has no LF. A CR is good only as the last octet.
func couldBeLine(b []byte, first bool) bool {
	for i, c := range b {
		if class[c]&(isTarget|isToken) == 0 && c != ' ' && (c != '\r' || i != len(b)-1) {
			return false
		}
	}
	return !first || class[b[0]]&isToken != 0
}
