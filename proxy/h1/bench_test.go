package h1

import (
	"strings"
	"testing"
)

// plain allows everything and adds one line, as an ingress does.
type plain struct {
	add      []byte
	requests int
}

func (p *plain) Request(h *Head) Verdict {
	p.requests++
	return Verdict{Allow: true, Add: p.add}
}
func (p *plain) Response(uint32, int)   {}
func (p *plain) Refused(Refusal) *Reply { return nil }

const (
	benchGET = "GET /api/v1/orders/4711?expand=items HTTP/1.1\r\nHost: orders.shop.test\r\nUser-Agent: curl/8.14.1\r\n" +
		"Accept: */*\r\nAccept-Encoding: gzip, deflate\r\nX-Request-Id: 0123456789abcdef0123456789abcdef\r\n" +
		"Connection: keep-alive\r\n\r\n"
	benchOK = "HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Sun, 22 Nov 2026 10:00:00 GMT\r\nContent-Type: application/json\r\n" +
		"Content-Length: 27\r\nConnection: keep-alive\r\n\r\n{\"id\":4711,\"state\":\"open\"}\n"
)

func newPlain() (*Conn, *plain) {
	p := &plain{add: AppendXFCC(nil, "spiffe://shop.test/ns/b/sa/orders", "spiffe://shop.test/ns/a/sa/front", make([]byte, 32))}
	return New(&Config{Strip: NewNames(IdentityFields()...)}, p), p
}

// exchange is one round: all of each message is taken.
func exchange(tb testing.TB, c *Conn, down, up *Out, request, response []byte) {
	if n, err := c.Downstream(request, false, down); n != len(request) || err != nil || len(down.Reply) > 0 {
		tb.Fatalf("downstream took %d of %d: %v %s", n, len(request), err, down.Reply)
	}
	if n, err := c.Upstream(response, false, up); n != len(response) || err != nil {
		tb.Fatalf("upstream took %d of %d: %v", n, len(response), err)
	}
}

func bigPair(n int) (request, response []byte) {
	body := strings.Repeat("x", n)
	head := "POST /upload HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
	return []byte(head + "100000\r\n" + body + "\r\n0\r\n\r\n"),
		[]byte("HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n" + body)
}

func TestNoAllocations(t *testing.T) {
	big, bigOK := bigPair(1 << 20)
	upper := []byte("GET / HTTP/1.1\r\nHost: SHOP.test\r\nX_Forwarded_Client_Cert: forged\r\n\r\n")
	v6 := []byte("GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n")
	chunks := []byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n")
	for name, m := range map[string][2][]byte{
		"get":    {[]byte(benchGET), []byte(benchOK)},
		"big":    {big, bigOK},
		"edited": {upper, chunks},
		"v6":     {v6, []byte(benchOK)},
	} {
		c, _ := newPlain()
		var down, up Out
		exchange(t, c, &down, &up, m[0], m[1])
		if n := testing.AllocsPerRun(100, func() { exchange(t, c, &down, &up, m[0], m[1]) }); n != 0 {
			t.Errorf("%s: %v allocations per request", name, n)
		}
	}
}

func TestNoAllocationsWhenPipelinedOrInPieces(t *testing.T) {
	c, p := newPlain()
	var down, up Out
	in := []byte(strings.Repeat(benchGET, 8))
	back := []byte(strings.Repeat(benchOK, 8))
	pieces := func() {
		for from := 0; from < len(in); {
			to := min(len(in), from+100)
			for {
				n, _ := c.Downstream(in[from:to], false, &down)
				if from += n; from == to || to == len(in) {
					break
				}
				to = min(len(in), to+100)
			}
		}
		if _, err := c.Upstream(back, false, &up); err != nil {
			t.Fatal(err)
		}
	}
	pieces()
	if n := testing.AllocsPerRun(50, pieces); n != 0 || p.requests != 52*8 {
		t.Errorf("%v allocations, %d requests", n, p.requests)
	}
}

func BenchmarkGET(b *testing.B) {
	c, _ := newPlain()
	var down, up Out
	request, response := []byte(benchGET), []byte(benchOK)
	b.ReportAllocs()
	b.SetBytes(int64(len(request) + len(response)))
	for b.Loop() {
		exchange(b, c, &down, &up, request, response)
	}
}

func BenchmarkBody1MiB(b *testing.B) {
	c, _ := newPlain()
	var down, up Out
	request, response := bigPair(1 << 20)
	b.ReportAllocs()
	b.SetBytes(int64(len(request) + len(response)))
	for b.Loop() {
		exchange(b, c, &down, &up, request, response)
	}
}

func BenchmarkDeny(b *testing.B) {
	cfg := &Config{}
	c := New(cfg, denier{})
	var down Out
	request := []byte(benchGET)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Downstream(request, false, &down); err != nil || len(down.Reply) != 1 {
			b.Fatal(err)
		}
	}
}

type denier struct{}

func (denier) Request(*Head) Verdict {
	return Verdict{Reply: Deny(403, "0123456789abcdef01234567-1", "no policy permits it")}
}
func (denier) Response(uint32, int)   {}
func (denier) Refused(Refusal) *Reply { return nil }
