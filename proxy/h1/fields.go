package h1

import "bytes"

// fields is what the filter itself needs of a head's field lines.
type fields struct {
	host      int   // index of the Host line, -1 without
	length    int64 // Content-Length, -1 without
	chunked   bool
	close     bool // Connection: close
	keepAlive bool // Connection: keep-alive
	expect    bool // an Expect field is present, whatever it expects
	upgrades  int  // upgrade tokens left after h2c was taken out
	upgrade   []byte
}

// read looks at every line. names are fields that Connection must not nominate.
// It is the same for requests and responses, except for the fields that only
// have a meaning in requests.
func (f *fields) read(head []byte, lines []line, request bool, names *Names) fault {
	*f = fields{host: -1, length: -1}
	for i := range lines {
		l := &lines[i]
		if bad := f.line(head, l, i, request, names); bad.bad() {
			return bad
		}
	}
	if f.chunked && f.length >= 0 {
		// RFC 9112 section 6.1 allows to let one of them win. Refused, because the
		// next parser may let the other win.
		return malformed("both Transfer-Encoding and Content-Length")
	}
	return fault{}
}

// line switches on the length first: most names are none of these.
func (f *fields) line(head []byte, l *line, i int, request bool, names *Names) fault {
	name, value := head[l.start:l.nameEnd], head[l.value:l.valueEnd]
	switch len(name) {
	case len("host"):
		if request && foldsTo(name, "host") {
			return f.setHost(i)
		}
	case len("expect"):
		f.expect = f.expect || foldsTo(name, "expect")
	case len("upgrade"):
		if request && foldsTo(name, "upgrade") {
			f.setUpgrade(l, value)
		}
	case len("connection"):
		if foldsTo(name, "connection") {
			return f.setConnection(value, request, names)
		}
	case len("content-length"):
		if foldsTo(name, "content-length") {
			return f.setLength(name, value)
		}
		if request && foldsTo(name, "http2-settings") {
			l.strike()
		}
	case len("transfer-encoding"):
		if foldsTo(name, "transfer-encoding") {
			return f.setCoding(name, value)
		}
	}
	return fault{}
}

// strike marks a line that is not to be forwarded; its name can still be read.
func (l *line) strike() { l.end = -l.end }

func (l *line) struck() bool { return l.end < 0 }

func (l *line) bounds() (from, to int) { return int(l.start), int(max(l.end, -l.end)) }

func (f *fields) setHost(i int) fault {
	if f.host >= 0 {
		return malformed("more than one Host") // RFC 9112 section 3.2
	}
	f.host = i
	return fault{}
}

func (f *fields) setLength(name, value []byte) fault {
	if name[len("content")] != '-' {
		return malformed("look-alike of Content-Length")
	}
	if f.length >= 0 {
		return malformed("more than one Content-Length")
	}
	n, ok := parseLength(value)
	if !ok {
		return malformed("invalid Content-Length")
	}
	f.length = n
	return fault{}
}

// setCoding accepts chunked and nothing else: not a list, not a second line,
// not identity, no trailing comma (RFC 9112 section 6.1).
func (f *fields) setCoding(name, value []byte) fault {
	if name[len("transfer")] != '-' {
		return malformed("look-alike of Transfer-Encoding")
	}
	if f.chunked || !equalLower(value, "chunked") {
		return malformed("Transfer-Encoding other than chunked")
	}
	f.chunked = true
	return fault{}
}

// setConnection reads the options. A client that nominates a field of ours, or
// one that frames the message, wants the next proxy to remove it (RFC 9110 section 7.6.1).
func (f *fields) setConnection(value []byte, request bool, names *Names) fault {
	for len(value) > 0 {
		var option []byte
		option, value = nextElement(value)
		switch {
		case equalLower(option, "close"):
			f.close = true
		case equalLower(option, "keep-alive"):
			f.keepAlive = true
		case request && (names.Has(option) || essential.Has(option)):
			return malformed("Connection nominates a protected header")
		}
	}
	return fault{}
}

// essential fields are nobody's to nominate, nor to send in a trailer.
var essential = NewNames("Host", "Content-Length", "Transfer-Encoding")

// setUpgrade takes the line out when it offers HTTP/2 in clear: a server that
// took it would carry requests that nobody decides. A server is free to ignore
// any Upgrade (RFC 9110 section 7.8), so the request itself goes on.
func (f *fields) setUpgrade(l *line, value []byte) {
	for list := value; len(list) > 0; {
		var token []byte
		token, list = nextElement(list)
		if name, _, _ := bytes.Cut(token, []byte("/")); hidesRequests(name) {
			l.strike()
			return
		}
	}
	for len(value) > 0 {
		var token []byte
		if token, value = nextElement(value); len(token) > 0 {
			f.upgrade = token
			f.upgrades++
		}
	}
}

func hidesRequests(protocol []byte) bool {
	return equalLower(protocol, "h2c") || equalLower(protocol, "h2") || equalLower(protocol, "http")
}

func nextElement(list []byte) (element, rest []byte) {
	element, rest, _ = bytes.Cut(list, []byte(","))
	return trim(element), rest
}

// parseLength reads 1*DIGIT (RFC 9110 section 8.6), at most 18 digits, which is below 1<<60.
func parseLength(b []byte) (n int64, ok bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}
