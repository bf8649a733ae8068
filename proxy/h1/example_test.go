package h1_test

import (
	"fmt"

	"ringfence.dev/proxy/h1"
)

// readOnly permits what does not change anything.
type readOnly struct{ line []byte }

func (r *readOnly) Request(h *h1.Head) h1.Verdict {
	if h.Method != "GET" && h.Method != "HEAD" {
		return h1.Verdict{Reply: h1.Deny(403, "00112233445566778899aabb-1", "read only")}
	}
	r.line = h1.AppendXFCC(r.line[:0], "spiffe://shop.test/ns/b/sa/orders", "spiffe://shop.test/ns/a/sa/front", nil)
	return h1.Verdict{Allow: true, Add: r.line}
}

func (r *readOnly) Response(seq uint32, status int)    {}
func (r *readOnly) Refused(h1.Refusal) (own *h1.Reply) { return nil }

func ExampleConn() {
	cfg := &h1.Config{Strip: h1.NewNames(h1.IdentityFields()...)}
	c := h1.New(cfg, &readOnly{})

	var out h1.Out
	in := []byte("GET / HTTP/1.1\r\nHost: orders\r\nx_forwarded_client_cert: me\r\n\r\nDELETE / HT")
	n, err := c.Downstream(in, false, &out)
	for _, span := range out.Forward {
		fmt.Printf("to the server: %q\n", span)
	}
	fmt.Printf("kept: %q %v %v\n", in[n:], out.NeedMore, err)
	// Output:
	// to the server: "GET / HTTP/1.1\r\n"
	// to the server: "X-Forwarded-Client-Cert: By=spiffe://shop.test/ns/b/sa/orders;URI=spiffe://shop.test/ns/a/sa/front\r\n"
	// to the server: "Host: orders\r\n"
	// to the server: "\r\n"
	// kept: "DELETE / HT" true <nil>
}
