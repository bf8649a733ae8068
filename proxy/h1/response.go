package h1

// responseHead is what the filter reads of a response head.
type responseHead struct {
	status int
	minor  int
	fields fields
}

// parse reads a whole response head. request is the entry it answers.
func (r *responseHead) parse(raw []byte, out *Out) fault {
	first, f := r.parseLine(raw)
	if f.bad() {
		return f
	}
	out.lines, f = parseFields(raw, first, out.lines[:0])
	if f.bad() {
		return f
	}
	if f := r.fields.read(raw, out.lines, false, nil); f.bad() {
		return f
	}
	if r.fields.chunked && r.minor == 0 {
		return malformed("Transfer-Encoding in HTTP/1.0")
	}
	return fault{}
}

// parseLine reads HTTP/1.x SP 3DIGIT [SP reason] CRLF. RFC 9112 section 4 wants
// the second space even without a reason, but many servers leave it out.
func (r *responseHead) parseLine(b []byte) (next int, f fault) {
	const version = len("HTTP/1.1 ")
	end := version + 3
	if len(b) < end+2 || string(b[:7]) != "HTTP/1." || b[7] != '0' && b[7] != '1' || b[8] != ' ' {
		return 0, malformed("not an HTTP/1.x status line")
	}
	r.minor, r.status = int(b[7]-'0'), 0
	for _, c := range b[version:end] {
		if !digit(c) {
			return 0, malformed("invalid status code")
		}
		r.status = r.status*10 + int(c-'0')
	}
	for next = end; b[next] != '\n'; {
		next++
	}
	reason := b[end : next-1]
	if r.status < 100 || len(reason) > 0 && reason[0] != ' ' || !validValue(reason) {
		return 0, malformed("invalid status line")
	}
	return next + 1, fault{}
}

// closes reports whether the server ends the connection after this response.
func (r *responseHead) closes() bool {
	return r.fields.close || r.minor == 0 && !r.fields.keepAlive
}

// frame is how the body ends (RFC 9112 section 6.3).
func (r *responseHead) frame(e entry) (kind bodyKind, length int64) {
	f := &r.fields
	switch {
	case e.has(isHEAD), r.status == 204, r.status == 304:
		return noBody, 0
	case f.chunked:
		return chunkSize, 0
	case f.length == 0:
		return noBody, 0
	case f.length > 0:
		return counted, f.length
	}
	return untilEOF, 0
}
