package proxy_test

import (
	"bufio"
	"fmt"
	"net/http"
	"testing"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/h1"
	"ringfence.dev/proxy/proxytest"
)

func TestOpaqueThroughTunnel(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.service(t, "b/sa/echo", echo)
	c := a.dial(t, to)
	exchange(t, c, "one")
	exchange(t, c, "two")
	if infos := b.relay.Connections(); len(infos) != 1 || infos[0].SourceID != "spiffe://lab.test/ns/a/sa/caller" ||
		infos[0].DestinationID != "spiffe://lab.test/ns/b/sa/echo" || infos[0].Carrier != "tunnel" {
		t.Errorf("connections = %+v", infos)
	}
	if ai, bi := a.relay.Connections(), b.relay.Connections(); ai[0].ID != bi[0].ID {
		t.Error("the two sides record under different ids")
	}
	if infos := a.relay.Peers(); len(infos) != 1 || infos[0].State != "agent" {
		t.Errorf("peers = %+v", infos)
	}
}

func TestHTTPServerLearnsCaller(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	to := b.web(t, "b/sa/web", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Values(h1.XFCCField))
	})
	c := a.dial(t, to)
	r := bufio.NewReader(c)
	for range 3 {
		_, body := get(t, c, r, "/", "X-Forwarded-Client-Cert: URI=spiffe://lab.test/ns/root/sa/admin")
		if want := "URI=spiffe://lab.test/ns/a/sa/caller]"; len(body) < len(want) || body[len(body)-len(want):] != want {
			t.Fatalf("server sees %q", body)
		}
	}
}
