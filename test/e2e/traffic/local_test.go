package traffic_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/test/e2e/world"
	"ringfence.dev/tools/ringfence/lab"
)

const localPolicy = `@id("front-asks-back")
permit (principal == Workload::"spiffe://lab.test/ns/a/sa/front", action == Action::"connect",
  resource == Service::"spiffe://lab.test/ns/a/sa/back");

@id("front-reads-shelf")
permit (principal == Workload::"spiffe://lab.test/ns/a/sa/front", action in [Action::"read"],
  resource == Service::"spiffe://lab.test/ns/a/sa/shelf") when { context.request.path like "/open/*" };
`

// Both ends on one agent: one decision, no tunnel, and the server sees its client.
func TestBothEndsOnOneHost(t *testing.T) {
	o := lab.Options{Agents: []string{"a"}, Policies: world.Policies(t, localPolicy)}
	world.ForEach(t, o, func(t *testing.T, w *world.World) {
		front, back, stranger := w.Puppet("a", "front"), w.Puppet("a", "back"), w.Puppet("a", "stranger")
		for _, addr := range []string{"192.0.2.1:7000", "[2001:db8::1]:7000", "127.0.0.1:7000", "[::1]:7000"} {
			l := back.Listen(addr)
			c := front.MustDial(addr)
			s := l.MustAccept()
			if c.Remote != addr {
				t.Errorf("%s: the client sees %s", addr, c.Remote)
			}
			if w.Capture == "ebpf" && s.Remote != c.Local {
				t.Errorf("%s: the server sees %s, the client is %s", addr, s.Remote, c.Local)
			}
			c.Send("hello")
			s.Want("hello")
			s.CloseWrite()
			if got, err := c.Rest(); got != "" || err != nil {
				t.Errorf("%s: client read %q, %v", addr, got, err)
			}
			_, _ = c.Close(), s.Close()
			refusedDial(t, stranger, addr)
			if got, err := l.AcceptWithin(0); err == nil {
				t.Errorf("%s: the stranger reached the server as %s", addr, got.Remote)
			}
			l.Close()
		}
		all := w.Decisions("a")
		count := 0
		for _, r := range all {
			if r.Principal == "spiffe://lab.test/ns/a/sa/front" {
				count++
				if r.Side != authz.Local || !r.Mesh || r.Unit != "front.service" || r.Effect != authz.Permit {
					t.Errorf("%+v", r)
				}
			}
		}
		if count != 4 {
			t.Errorf("%d decisions for four connections: %+v", count, all)
		}
		if s := w.Status("a"); s.Counters["dialled_tunnels"] != 0 || s.Counters["accepted_tunnels"] != 0 {
			t.Errorf("tunnels were made: %+v", s.Counters)
		}
		localHTTP(t, w, front, stranger)
	})
}

func localHTTP(t *testing.T, w *world.World, front, stranger *world.Puppet) {
	w.Puppet("a", "shelf").Web("127.0.0.1:80")
	e := dial(t, front, "127.0.0.1:80")
	e.Send(strings.Replace(request("/open/1"), "\r\n\r\n", "\r\nX-Forwarded-Client-Cert: URI=spiffe://lab.test/king\r\n\r\n", 1) + request("/shut/2") + request("/open/3"))
	_, body := e.status(200)
	var seen world.SeenRequest
	if err := json.Unmarshal([]byte(body), &seen); err != nil {
		t.Fatal(err)
	}
	if got := seen.Header.Values("X-Forwarded-Client-Cert"); len(got) != 1 || !strings.Contains(got[0], "URI=spiffe://lab.test/ns/a/sa/front") {
		t.Errorf("the server was told %q", got)
	}
	e.status(403)
	e.status(200)
	refusedDial(t, stranger, "127.0.0.1:80")
	denied := w.Decisions("a", "--effect", "deny")
	if !slices.ContainsFunc(denied, func(r decisionlog.Record) bool { return r.Path == "/shut/2" && r.Side == authz.Local }) {
		t.Errorf("the refused request is not among %+v", denied)
	}
	c, err := front.Dial("127.0.0.1:7999")
	if err == nil {
		_, err = c.Rest()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a closed port on loopback: %v", err)
	}
}
