package h1

import (
	"bytes"
	"iter"
)

// Form is the form of a request target (RFC 9112 section 3.2).
type Form uint8

const (
	OriginForm    Form = iota // /path?query
	AbsoluteForm              // http://host/path
	AuthorityForm             // host:port, of CONNECT only
	AsteriskForm              // *, of OPTIONS only
)

// Head is one request head, parsed where it lies. Its strings are valid during
// the call it is given to only; clone what is kept.
type Head struct {
	// Seq counts the requests of the connection from one.
	Seq    uint32
	Method string // case-sensitive
	Target string // as sent
	Form   Form
	// Host is the request's authority in lower case: that of the target if it has
	// one, else the Host field's. A port is kept, an empty one is not. It is empty
	// when the client named none, which HTTP/1.0 allows.
	Host string
	// Minor is the minor version: HTTP/1.Minor.
	Minor int
	// Upgrade is the protocol asked for, lower case and with its version if it has one; empty for none.
	Upgrade string
	// ContentLength is the body's length in octets, zero without a body, -1 when chunked.
	ContentLength int64

	raw     []byte
	lines   []line
	first   int // where the request line ends, with its CRLF
	fields  fields
	connect bool
	isHEAD  bool
}

// Fields yields names and values as sent, in order, lines that are going to be
// removed included.
func (h *Head) Fields() iter.Seq2[string, string] {
	return func(yield func(name, value string) bool) {
		for i := range h.lines {
			l := &h.lines[i]
			if !yield(view(h.raw[l.start:l.nameEnd]), view(h.raw[l.value:l.valueEnd])) {
				return
			}
		}
	}
}

// Get returns the value of the first field of that name, which is given in
// lower case. Unlike Strip, it tells hyphens from underscores.
func (h *Head) Get(lowerName string) (value string, ok bool) {
	for i := range h.lines {
		l := &h.lines[i]
		if equalLower(h.raw[l.start:l.nameEnd], lowerName) {
			return view(h.raw[l.value:l.valueEnd]), true
		}
	}
	return "", false
}

// Raw is the head as sent, with the empty line that ends it.
func (h *Head) Raw() []byte { return h.raw }

// hasBody reports whether any octet of a body follows or may follow.
func (h *Head) hasBody() bool { return h.ContentLength != 0 }

// wantsClose reports whether the client ends the connection after this request
// (RFC 9112 section 9.3).
func (h *Head) wantsClose() bool {
	return h.fields.close || h.Minor == 0 && !h.fields.keepAlive
}

// parse reads a whole head. out gives the memory.
func (h *Head) parse(raw []byte, cfg *Config, out *Out) fault {
	h.raw = raw
	if f := h.parseLine(raw); f.bad() {
		return f
	}
	var f fault
	out.lines, f = parseFields(raw, h.first, out.lines[:0])
	if f.bad() {
		return f
	}
	h.lines = out.lines
	if f := h.fields.read(raw, h.lines, true, cfg.Strip); f.bad() {
		return f
	}
	if f := h.frame(); f.bad() {
		return f
	}
	if f := h.authority(out); f.bad() {
		return f
	}
	return h.checkUpgrade(cfg, out)
}

// parseLine reads METHOD SP target SP HTTP/1.x CRLF at the start of b, single
// spaces and nothing else (RFC 9112 section 3).
func (h *Head) parseLine(b []byte) fault {
	h.first = bytes.IndexByte(b, '\n') + 1
	text := b[:h.first-2]
	sp := bytes.IndexByte(text, ' ')
	if sp <= 0 || !all(text[:sp], isToken) {
		return malformed("not an HTTP request line")
	}
	method, rest := text[:sp], text[sp+1:]
	sp = bytes.IndexByte(rest, ' ')
	if sp <= 0 || !all(rest[:sp], isTarget) {
		return malformed("not an HTTP/1.x request line")
	}
	target, version := rest[:sp], rest[sp+1:]
	h.Method, h.Target = view(method), view(target)
	h.isHEAD, h.connect = h.Method == "HEAD", h.Method == "CONNECT"
	return h.parseVersion(version)
}

func (h *Head) parseVersion(v []byte) fault {
	if len(v) != len("HTTP/1.1") || string(v[:5]) != "HTTP/" || v[6] != '.' || !digit(v[5]) || !digit(v[7]) {
		return malformed("not an HTTP/1.x request line")
	}
	if h.Method == "PRI" && string(v) == "HTTP/2.0" {
		return malformed("HTTP/2 preface on an HTTP/1 connection") // RFC 9113 section 3.4
	}
	if v[5] != '1' || v[7] > '1' {
		return fault{505, "HTTP version not supported"}
	}
	h.Minor = int(v[7] - '0')
	return fault{}
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

// nominates reports whether a Connection field names one of names.
func (h *Head) nominates(names *Names) bool {
	for i := range h.lines {
		l := &h.lines[i]
		if !foldsTo(h.raw[l.start:l.nameEnd], "connection") {
			continue
		}
		for list := h.raw[l.value:l.valueEnd]; len(list) > 0; {
			var option []byte
			if option, list = nextElement(list); names.Has(option) {
				return true
			}
		}
	}
	return false
}

func (h *Head) frame() fault {
	f := &h.fields
	switch {
	case f.chunked && h.Minor == 0:
		return malformed("Transfer-Encoding in HTTP/1.0") // RFC 9112 section 6.1
	case h.connect && (f.chunked || f.length > 0):
		// RFC 9110 section 9.3.6 gives it no meaning; the octets could be taken for tunnelled ones.
		return malformed("CONNECT with a body")
	case f.chunked:
		h.ContentLength = -1
	default:
		h.ContentLength = max(f.length, 0)
	}
	return fault{}
}

// authority settles what the request is for (RFC 9112 section 3.3).
func (h *Head) authority(out *Out) fault {
	target, f := h.targetAuthority()
	if f.bad() {
		return f
	}
	var host []byte
	if i := h.fields.host; i >= 0 {
		host = h.raw[h.lines[i].value:h.lines[i].valueEnd]
	} else if h.Minor > 0 {
		return malformed("no Host") // RFC 9112 section 3.2
	}
	if len(host) > 0 && !validAuthority(host) {
		return malformed("invalid Host")
	}
	host = withoutEmptyPort(host)
	if target != nil {
		// RFC 9112 section 3.2.2 has the proxy replace Host by the target's authority.
		// A client must send both the same, so one that does not wants them to be read apart.
		if h.fields.host >= 0 && !bytes.EqualFold(host, target) {
			return malformed("Host differs from the request target")
		}
		host = target
	}
	h.Host = view(lowered(host, out))
	return fault{}
}

// lowered is b in lower case, a copy only where it has to be.
func lowered(b []byte, out *Out) []byte {
	for _, c := range b {
		if c != toLower(c) {
			b = out.copied(b)
			for i := range b {
				b[i] = toLower(b[i])
			}
			return b
		}
	}
	return b
}

// websocket is what may be upgraded to when the configuration does not say.
var websocket = []string{"websocket"}

// connectToken stands among Config.Upgrades for the method CONNECT.
const connectToken = "connect"

func (h *Head) checkUpgrade(cfg *Config, out *Out) fault {
	open := cfg.Mode == Observe || cfg.Mode == Passive
	if h.connect && !open && !cfg.upgradesTo([]byte(connectToken)) {
		// A server that is no proxy and answers 200 all the same, as simple handlers
		// do, would read the tunnel's octets as requests that nobody has decided.
		return malformed("CONNECT to a service that is not known for a proxy")
	}
	if h.fields.upgrades == 0 {
		return fault{}
	}
	h.Upgrade = view(lowered(h.fields.upgrade, out))
	if open {
		return fault{}
	}
	if h.fields.upgrades > 1 {
		return malformed("more than one upgrade")
	}
	name, _, _ := bytes.Cut(h.fields.upgrade, []byte("/"))
	if cfg.upgradesTo(name) {
		return fault{}
	}
	return malformed("upgrade to an unknown protocol")
}

func (c *Config) upgradesTo(name []byte) bool {
	known := c.Upgrades
	if known == nil {
		known = websocket
	}
	for _, k := range known {
		if equalLower(name, k) {
			return true
		}
	}
	return false
}
