package traffic_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/test/e2e/world"
	"ringfence.dev/test/nettest"
	"ringfence.dev/tools/ringfence/lab"
)

// In dry-run nothing is refused, answered or cut, whatever it is; all that
// would have been refused is recorded.
func TestDryRun(t *testing.T) {
	forEachShop(t, lab.Options{Mode: "dry-run"}, func(t *testing.T, w *shopWorld) {
		t.Run("policy", func(t *testing.T) { dryRunPolicy(t, w) })
		t.Run("connection", func(t *testing.T) { dryRunConnection(t, w) })
		t.Run("oddities", func(t *testing.T) { dryRunOddities(t, w) })
	})
}

func dryRunPolicy(t *testing.T, w *shopWorld) {
	e := dial(t, w.shop, "192.0.2.2:80")
	e.Send(request("/dry/1") + request("/admin/2") + "DELETE /dry/3 HTTP/1.1\r\nHost: web\r\n\r\n" + request("/dry/4"))
	for range 4 {
		e.status(200)
	}
	for _, target := range []string{"/dry/1", "/admin/2", "/dry/3", "/dry/4"} {
		if !w.reached(target) {
			t.Errorf("%s did not reach the server", target)
		}
	}
	would := w.Decisions("b", "--effect", "would_deny")
	for _, path := range []string{"/admin/2", "/dry/3"} {
		i := slices.IndexFunc(would, func(r decisionlog.Record) bool { return r.Path == path })
		if i < 0 || would[i].Effect != authz.WouldDeny || would[i].Mode != authz.DryRun {
			t.Errorf("%s: no would_deny among %+v", path, would)
		}
	}
	if slices.ContainsFunc(would, func(r decisionlog.Record) bool { return r.Path == "/dry/1" || r.Path == "/dry/4" }) {
		t.Errorf("what is permitted would have been refused: %+v", would)
	}
	if s := w.Status("b"); s.Decisions.WouldDeny < 2 || s.Decisions.Deny != 0 {
		t.Errorf("status counts %+v", s.Decisions)
	}
}

func dryRunConnection(t *testing.T, w *shopWorld) {
	sub := w.In(t)
	sub.Puppet("b", "server").Echo("[::]:7000")
	intruder := sub.Puppet("a", "intruder")
	for _, ip := range world.Addresses {
		c := intruder.MustDial(port(ip, "7000"))
		c.Send("let me in")
		c.Want("let me in")
		last := w.Ringfence("a", "explain", "--last", "--unit", "intruder")
		if !strings.Contains(last.Out, "WOULD DENY") || !strings.Contains(last.Out, "no-intruder") {
			t.Errorf("explain says\n%s", last.Out)
		}
		_ = c.Close()
	}
}

// Each of these would be refused by an enforcing scope. In dry-run the service
// gets exactly these bytes, and its answer comes back.
func dryRunOddities(t *testing.T, w *shopWorld) {
	sub := w.In(t)
	raw := sub.Puppet("b", "web") // of the same identity, so HTTP-only too
	l := raw.Listen("192.0.2.2:8000")
	for name, text := range map[string]string{
		"leading CRLF":   "\r\nGET /odd/1 HTTP/1.1\r\nHost: web\r\n\r\n",
		"HTTP/0.9":       "GET /odd/2\r\n",
		"HTTP/2 preface": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"Redis inline":   "SET a b\r\n",
		"TLS":            "\x16\x03\x01\x00\x05hello",
		"bare LF":        "GET /odd/3 HTTP/1.1\nHost: web\n\n",
		"CL and TE":      "POST /odd/4 HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"two CL":         "POST /odd/5 HTTP/1.1\r\nHost: web\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
		"folded line":    "GET /odd/6 HTTP/1.1\r\nHost: web\r\nX: a\r\n b\r\n\r\n",
		"large head":     "GET /odd/7 HTTP/1.1\r\nHost: web\r\nX: " + strings.Repeat("x", 100<<10) + "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := w.shop.In(t).MustDial("192.0.2.2:8000")
			s := l.In(t).MustAccept()
			c.Send(text)
			s.Want(text)
			s.Send("+OK\r\n")
			c.Want("+OK\r\n")
			c.CloseWrite()
			if rest, err := s.Rest(); rest != "" || err != nil {
				t.Errorf("the server read %q, %v", rest, err)
			}
			_, _ = c.Close(), s.Close()
			var x policy.Explanation
			nettest.Wait(t, "the would-be refusal to be recorded", func() bool {
				r := w.Ringfence("b", "explain", "--last", "-o", "json")
				return json.Unmarshal([]byte(r.Out), &x) == nil && x.Record.Action == "refuse"
			})
			if x.Record.Effect != authz.WouldDeny || x.Record.Reason == "" {
				t.Errorf("%+v", x.Record)
			}
		})
	}
	l.Close()
}
