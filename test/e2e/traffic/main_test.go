// Package traffic_test tests what becomes of traffic between two protected
// hosts: protocols and programs unchanged, policy decided and explained, and
// the tunnel held against those who should not use it.
package traffic_test

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"

	"ringfence.dev/test/e2e/world"
)

func TestMain(m *testing.M) { world.Main(m) }

// Identities of the units that these tests use.
const (
	idShop = "spiffe://lab.test/ns/a/sa/shop"
	idWeb  = "spiffe://lab.test/ns/b/sa/web"
)

// shopPolicy makes web HTTP-only: the shop may read all but /admin, and post
// orders. Everything else in the lab is permitted to whoever has an identity,
// except to the intruder.
const shopPolicy = `@id("all-with-identity")
permit (principal is Workload, action == Action::"connect", resource);

@id("no-intruder") @reason("the intruder is not to be trusted")
forbid (principal == Workload::"spiffe://lab.test/ns/a/sa/intruder", action == Action::"connect", resource)
when { resource.port == 6379 || resource.port == 7000 };

@id("shop-reads") @reason("the shop may read all but what is for administrators")
permit (principal == Workload::"spiffe://lab.test/ns/a/sa/shop", action in [Action::"read"],
  resource == Service::"spiffe://lab.test/ns/b/sa/web")
unless { context.request.path like "/admin*" };

@id("shop-orders")
permit (principal == Workload::"spiffe://lab.test/ns/a/sa/shop", action == Action::"POST",
  resource == Service::"spiffe://lab.test/ns/b/sa/web")
when { context.request.path like "/orders/*" };
`

// port writes an address and a port as dialled.
func port(ip, port string) string {
	if strings.Contains(ip, ":") {
		return "[" + ip + "]:" + port
	}
	return ip + ":" + port
}

// exchange is a client's connection whose responses are read as HTTP.
type exchange struct {
	*world.Conn
	t testing.TB
	r *bufio.Reader
}

func dial(t testing.TB, p *world.Puppet, addr string) *exchange {
	t.Helper()
	c, err := p.Dial(addr)
	if err != nil {
		t.Fatalf("dial %s: %v", addr, err)
	}
	t.Cleanup(func() { _ = c.Close() }) // a second Close is no matter
	return &exchange{c, t, bufio.NewReader(c)}
}

// response reads the next response, to a request of a method, with its body.
func (e *exchange) response(method string) (*http.Response, string) {
	e.t.Helper()
	resp, err := http.ReadResponse(e.r, &http.Request{Method: method})
	if err != nil {
		e.t.Fatalf("read response: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Fatalf("read body of %s: %v", resp.Status, err)
	}
	return resp, string(body)
}

// status reads the next response and fails unless it has that status.
func (e *exchange) status(want int) (*http.Response, string) {
	e.t.Helper()
	resp, body := e.response("GET")
	if resp.StatusCode != want {
		e.t.Fatalf("status %d, want %d: %s", resp.StatusCode, want, body)
	}
	return resp, body
}

// ended fails unless nothing more comes.
func (e *exchange) ended() {
	e.t.Helper()
	if rest, err := io.ReadAll(e.r); len(rest) > 0 {
		e.t.Errorf("after the end came %q (%v)", rest, err)
	}
}
