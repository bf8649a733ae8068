package tunnel

import (
	"errors"
	"net/http"
	"strconv"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Request is a CONNECT. A received one may be any request at all: [Request.Connect] tells.
type Request struct {
	Method    string
	Authority string // IP:port, IPv6 in brackets; foreign peers may send a host name
	Scheme    string // a CONNECT has neither scheme, path nor protocol
	Path      string
	Protocol  string
	// Decision is the id under which the caller's agent recorded its decision
	// (our own header; foreign peers neither send nor mind it).
	Decision string
	// Forwarded is for="ip:port" of the workload that dialled (RFC 7239).
	Forwarded string
	Baggage   string // what the caller's mesh says of it
	Trace     string // traceparent
}

// Connect reports whether r is a plain CONNECT (RFC 9113 section 8.5).
func (r *Request) Connect() bool {
	return r.Method == http.MethodConnect && r.Authority != "" &&
		r.Scheme == "" && r.Path == "" && r.Protocol == ""
}

const decisionHeader = "ringfence-decision"

// encodeLocked makes the header block of a CONNECT. Values that never come
// again are kept out of the compression table.
func (t *Conn) encodeLocked(r *Request) []byte {
	t.encBuf.Reset()
	t.fieldLocked(":method", http.MethodConnect, false)
	t.fieldLocked(":authority", r.Authority, false)
	t.fieldLocked(decisionHeader, r.Decision, true)
	t.fieldLocked("forwarded", r.Forwarded, true)
	t.fieldLocked("baggage", r.Baggage, false)
	t.fieldLocked("traceparent", r.Trace, true)
	return t.encBuf.Bytes()
}

func (t *Conn) fieldLocked(name, value string, once bool) {
	if value != "" {
		// Writing to a bytes.Buffer cannot fail.
		_ = t.enc.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: once})
	}
}

// appendBlockLocked queues a header block as HEADERS and, past the peer's frame
// size, CONTINUATION.
func (t *Conn) appendBlockLocked(stream uint32, block []byte, flags http2.Flags) {
	typ := http2.FrameHeaders
	for {
		n := min(len(block), t.peerFrame)
		if n == len(block) {
			flags |= http2.FlagHeadersEndHeaders
		}
		t.out = appendHeader(t.out, n, typ, flags, stream)
		t.out = append(t.out, block[:n]...)
		if block = block[n:]; len(block) == 0 {
			return
		}
		typ, flags = http2.FrameContinuation, 0
	}
}

// headerBlock gathers one header block and decodes it.
type headerBlock struct {
	stream uint32 // zero: no block is open
	end    bool   // END_STREAM
	frames int
	octets int

	dec     *hpack.Decoder
	size    int // RFC 9113 section 6.5.2
	bad     bool
	regular bool // a regular field was seen
	request Request
	status  int
}

func (b *headerBlock) init() {
	b.dec = hpack.NewDecoder(4096, b.field)
	b.dec.SetMaxStringLength(maxHeaderList)
}

// field takes one decoded field. It goes on past the limits, since the
// compression table must be kept in step; the block is then refused.
func (b *headerBlock) field(f hpack.HeaderField) {
	if b.size += int(f.Size()); b.size > maxHeaderList {
		b.bad = true
		return
	}
	if !f.IsPseudo() {
		b.regular = true
		b.extra(f)
		return
	}
	target := b.pseudo(f)
	// RFC 9113 section 8.3: pseudo-headers come first, once each, and no others.
	if target == nil || b.regular || *target != "" {
		b.bad = true
		return
	}
	*target = f.Value
}

func (b *headerBlock) pseudo(f hpack.HeaderField) *string {
	switch f.Name {
	case ":method":
		return &b.request.Method
	case ":authority":
		return &b.request.Authority
	case ":scheme":
		return &b.request.Scheme
	case ":path":
		return &b.request.Path
	case ":protocol":
		return &b.request.Protocol
	case ":status":
		n, err := strconv.Atoi(f.Value)
		if err != nil || len(f.Value) != 3 || n < 100 || b.status != 0 {
			return nil
		}
		b.status = n
		return new(string)
	default:
		return nil
	}
}

// extra keeps the regular fields we have a use for; a repeated one counts as
// none rather than as whichever came last.
func (b *headerBlock) extra(f hpack.HeaderField) {
	var target *string
	switch f.Name {
	case decisionHeader:
		target = &b.request.Decision
	case "forwarded":
		target = &b.request.Forwarded
	case "baggage":
		target = &b.request.Baggage
	case "traceparent":
		target = &b.request.Trace
	case "connection", "transfer-encoding", "upgrade", "keep-alive", "proxy-connection":
		b.bad = true // RFC 9113 section 8.2.2
		return
	default:
		return
	}
	if *target != "" {
		b.bad = true
		return
	}
	*target = f.Value
}

// headers takes one frame of a header block and acts on a complete block.
func (r *frameReader) headers(p []byte) error {
	b := &r.block
	f := r.frame
	if f.typ == http2.FrameHeaders {
		var err error
		if p, err = unpad(f, p); err != nil {
			return err
		}
		*b = headerBlock{dec: b.dec, stream: f.stream, end: f.has(http2.FlagHeadersEndStream)}
	} else if b.stream == 0 {
		return protocolError("CONTINUATION without HEADERS")
	}
	b.frames++
	b.octets += len(p)
	if b.frames > 1+maxHeaderRun || b.octets > 2*maxHeaderList {
		return floodError("header block is too large")
	}
	if _, err := b.dec.Write(p); err != nil {
		return compressionError(err)
	}
	if !f.has(http2.FlagHeadersEndHeaders) {
		return nil
	}
	if err := b.dec.Close(); err != nil {
		return compressionError(err)
	}
	stream := b.stream
	b.stream = 0
	if r.t.client {
		return r.t.onResponse(stream, b)
	}
	return r.t.onRequest(stream, b)
}

// compressionError: once the table is out of step the connection is lost (RFC 7541 section 2.2).
func compressionError(err error) error {
	if errors.Is(err, hpack.ErrStringLength) {
		return floodError("header field is too large")
	}
	return &ConnError{Code: http2.ErrCodeCompression, Reason: "header block does not decode"}
}

// unpad strips padding and the deprecated priority fields of HEADERS (RFC 9113 section 6.2).
func unpad(f header, p []byte) ([]byte, error) {
	if f.stream == 0 {
		return nil, protocolError("HEADERS on the connection")
	}
	pad := 0
	if f.has(http2.FlagHeadersPadded) {
		if len(p) == 0 {
			return nil, protocolError("malformed HEADERS")
		}
		pad, p = int(p[0]), p[1:]
	}
	if f.has(http2.FlagHeadersPriority) {
		if len(p) < 5 {
			return nil, protocolError("malformed HEADERS")
		}
		p = p[5:]
	}
	if pad > len(p) {
		return nil, protocolError("padding is longer than its frame")
	}
	return p[:len(p)-pad], nil
}
