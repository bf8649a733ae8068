package h1

import "encoding/hex"

// The fields that carry ringfence's own word.
const (
	// XFCCField tells the server who its verified caller is, in Envoy's format.
	XFCCField = "X-Forwarded-Client-Cert"
	// DecisionField names the decision that a response of ours rests on.
	DecisionField = "Ringfence-Decision"
)

// IdentityFields are the names for Config.Strip: what a client sends under them is a forgery.
func IdentityFields() []string { return []string{XFCCField, DecisionField} }

// AppendXFCC appends the line that names a verified caller, with its CRLF: by
// is the SPIFFE ID the service is known by, uri the caller's, hash the SHA-256
// of the caller's leaf certificate in DER form. Empty elements are left out.
func AppendXFCC(dst []byte, by, uri string, hash []byte) []byte {
	dst = append(dst, XFCCField+": "...)
	start := len(dst)
	dst = appendElement(dst, start, "By=", by)
	if len(hash) > 0 {
		dst = hex.AppendEncode(appendElement(dst, start, "Hash=", ""), hash)
	}
	dst = appendElement(dst, start, "URI=", uri)
	return append(dst, "\r\n"...)
}

// appendElement quotes a value that could be taken for more than one element,
// and drops what could end the line. Hash= alone comes without a value.
func appendElement(dst []byte, start int, key, value string) []byte {
	if value == "" && key != "Hash=" {
		return dst
	}
	if len(dst) > start {
		dst = append(dst, ';')
	}
	dst = append(dst, key...)
	quoted := false
	for i := range len(value) {
		switch value[i] {
		case ',', ';', '=', '"', '\\', ' ':
			quoted = true
		}
	}
	if !quoted {
		return appendVisible(dst, value)
	}
	dst = append(dst, '"')
	for i := range len(value) {
		switch c := value[i]; {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c >= 0x20 && c < 0x7f:
			dst = append(dst, c)
		}
	}
	return append(dst, '"')
}
