package h1

import (
	"net/http"
	"strconv"
)

// Reply is a response of the filter's own.
type Reply struct {
	Status int
	// Phrase is the reason phrase; empty means the registered one.
	Phrase string
	// Lines are whole field lines, each with its CRLF, without Content-Length and Connection.
	Lines []byte
	Body  []byte
	// Close ends the connection even if it could go on.
	Close bool
}

// Deny makes a reply with a problem document (RFC 9457) as its body and the
// decision's id in the Ringfence-Decision field and in the document; an empty id
// is left out. detail is for the peer to read.
func Deny(status int, decision, detail string) *Reply {
	r := &Reply{Status: status}
	b := make([]byte, 0, 512)
	b = append(b, "Content-Type: application/problem+json\r\nCache-Control: no-store\r\n"...)
	if decision != "" {
		b = append(b, DecisionField+": "...)
		b = appendVisible(b, decision)
		b = append(b, "\r\n"...)
	}
	if status == http.StatusUnauthorized {
		// RFC 9110 section 15.5.2 wants a challenge; the scheme says what is missing.
		b = append(b, "WWW-Authenticate: SPIFFE\r\n"...)
	}
	lines := len(b)
	b = appendProblem(b, status, decision, detail)
	r.Lines, r.Body = b[:lines:lines], b[lines:]
	return r
}

func appendProblem(b []byte, status int, decision, detail string) []byte {
	b = append(b, `{"title":`...)
	b = appendJSON(b, phrase(status))
	b = append(b, `,"status":`...)
	b = strconv.AppendInt(b, int64(status), 10)
	if detail != "" {
		b = append(b, `,"detail":`...)
		b = appendJSON(b, detail)
	}
	if decision != "" {
		b = append(b, `,"decision":`...)
		b = appendJSON(b, decision)
	}
	return append(b, "}\n"...)
}

// appendJSON writes s as a JSON string. What is not printable ASCII is escaped
// or, outside of Unicode, replaced, so that the document is valid whatever s is.
func appendJSON(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r < 0x20 || r == 0x7f || r == '<' || r == '>' || r == '&':
			b = append(b, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		default:
			b = append(b, string(r)...)
		}
	}
	return append(b, '"')
}

// appendVisible writes the visible ASCII of s: what goes into a field value
// must not be able to end the line.
func appendVisible(b []byte, s string) []byte {
	for i := range len(s) {
		if s[i] > 0x20 && s[i] < 0x7f {
			b = append(b, s[i])
		}
	}
	return b
}

func phrase(status int) string {
	if text := http.StatusText(status); text != "" {
		return text
	}
	return "Refused"
}

// asker is what a reply depends on of the request it answers.
type asker struct {
	head  bool // to HEAD: no body, though its length is told
	minor int
	close bool
}

// render appends the reply in wire format.
func (r *Reply) render(b []byte, a asker) []byte {
	text := r.Phrase
	if text == "" {
		text = phrase(r.Status)
	}
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(r.Status), 10)
	b = append(append(b, ' '), text...)
	b = append(b, "\r\nContent-Length: "...)
	b = strconv.AppendInt(b, int64(len(r.Body)), 10)
	b = append(b, "\r\n"...)
	switch {
	case a.close:
		b = append(b, "Connection: close\r\n"...)
	case a.minor == 0:
		b = append(b, "Connection: keep-alive\r\n"...)
	}
	b = append(append(b, r.Lines...), "\r\n"...)
	if !a.head {
		b = append(b, r.Body...)
	}
	return b
}
