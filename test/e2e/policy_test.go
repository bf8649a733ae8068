package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"ringfence.dev/tools/ringfence/lab"
)

func parseSeen(t *testing.T, out string) (s seen) {
	t.Helper()
	body, _, _ := strings.Cut(out, "\n")
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return s
}

const httpPolicy = `@id("shop-reads")
permit (principal == Workload::"spiffe://lab.test/ns/a/sa/shop", action in [Action::"read"],
  resource in Service::"spiffe://lab.test/ns/b/sa/web") unless { context.request.path like "/admin*" };
`

func TestHTTPPolicy(t *testing.T) {
	program(t, "curl")
	forEachCapture(t, lab.Options{Policies: policies(t, httpPolicy)}, func(t *testing.T, w *world) {
		w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
		const url = "http://192.0.2.2"
		for _, c := range []struct {
			unit   string
			args   []string
			status string
			passes string // target that the server must have seen; empty for none
		}{
			{"shop", []string{url + "/orders/1"}, "200", "/orders/1"},
			{"shop", []string{"-d", "x", url + "/orders/2"}, "403", ""},
			{"shop", []string{url + "/admin/3"}, "403", ""},
			{"shop", []string{"--path-as-is", url + "/orders/../admin/4"}, "403", ""},
			{"shop", []string{"--path-as-is", url + "//admin/5"}, "403", ""},
			{"shop", []string{"--path-as-is", url + "/%61dmin/6"}, "403", ""},
			{"shop", []string{"--path-as-is", url + "/x%2F..%2Fadmin/7"}, "403", ""},
			{"intruder", []string{url + "/orders/8"}, "000", ""},
		} {
			out, _ := w.curl("a", c.unit, c.args...)
			if !strings.HasSuffix(out, "\n"+c.status) {
				t.Errorf("%s %v: %s, want status %s", c.unit, c.args, out, c.status)
			}
			if c.status == "403" && !strings.Contains(out, `"decision"`) {
				t.Errorf("%v: the refusal does not name its decision: %s", c.args, out)
			}
			target := strings.TrimPrefix(c.args[len(c.args)-1], url)
			if got := strings.Contains(w.log("web"), "request "+target+"\n"); got != (c.passes != "") {
				t.Errorf("%s %v: reached the server: %v", c.unit, c.args, got)
			}
		}
	})
}

// A caller must not be able to write what the server is told about it. Where
// every request needs its own permit, no oddity of framing gets around that.
func TestForgedIdentityHeaders(t *testing.T) {
	program(t, "curl")
	const king = "URI=spiffe://lab.test/ns/a/sa/king"
	forEachCapture(t, lab.Options{Policies: policies(t, httpPolicy)}, func(t *testing.T, w *world) {
		w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
		for _, headers := range [][]string{
			{"X-Forwarded-Client-Cert: " + king},
			{"x_forwarded_client_cert: " + king},
			{"X-FORWARDED-CLIENT-CERT: " + king, "X-Forwarded-Client-Cert: " + king},
			{"X-Forwarded-Client-Cert: " + king, "Connection: x-forwarded-client-cert"},
			{"X-Forwarded-Client-Cert : " + king},
		} {
			args := []string{"http://192.0.2.2/"}
			for _, h := range headers {
				args = append(args, "-H", h)
			}
			out, _ := w.curl("a", "shop", args...)
			if strings.Contains(out, "king") {
				t.Errorf("%q: the server was told: %s", headers, out)
			}
			if strings.HasSuffix(out, "\n200") && !strings.Contains(out, "URI=spiffe://lab.test/ns/a/sa/shop") {
				t.Errorf("%q: the server was not told its caller: %s", headers, out)
			}
		}
	})
}

// Beside a service that policy does not know as HTTP, the plain forgery is removed too.
func TestForgedHeaderOnAnyService(t *testing.T) {
	program(t, "curl")
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
		out, _ := w.curl("a", "shop", "-H", "X-Forwarded-Client-Cert: URI=spiffe://lab.test/ns/a/sa/king", "http://192.0.2.2/")
		if strings.Contains(out, "king") || !strings.Contains(out, "URI=spiffe://lab.test/ns/a/sa/shop") {
			t.Errorf("the server was told: %s", out)
		}
	})
}

// What is not HTTP must not pass by an HTTP policy.
func TestHTTPOnlyServiceRefusesTheRest(t *testing.T) {
	forEachCapture(t, lab.Options{Policies: policies(t, httpPolicy)}, func(t *testing.T, w *world) {
		w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
		for name, text := range map[string]string{
			"leading CRLF":  "\r\nGET /crlf HTTP/1.1\r\nHost: x\r\n\r\n",
			"HTTP/0.9":      "GET /old\r\n",
			"h2 preface":    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
			"inline Redis":  "SET a b\r\n",
			"CL and TE":     "GET /clte HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
			"bare LF":       "GET /lf HTTP/1.1\nHost: x\n\n",
			"huge head":     "GET /huge HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("x", 1<<20) + "\r\n\r\n",
			"space in name": "GET /name HTTP/1.1\r\nHost : x\r\n\r\n",
		} {
			out, _ := w.feed(text, "a", "shop", helperCommand("talk", "192.0.2.2:80", "whole")...)
			if strings.Contains(out, "200 OK") {
				t.Errorf("%s: %s", name, out)
			}
		}
		if log := w.log("web"); strings.Contains(log, "request ") {
			t.Errorf("the server was reached: %s", log)
		}
	})
}

func TestBytewiseClient(t *testing.T) {
	forEachCapture(t, lab.Options{Policies: policies(t, httpPolicy)}, func(t *testing.T, w *world) {
		w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
		out, code := w.feed("GET /bytewise HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "a", "shop",
			helperCommand("talk", "192.0.2.2:80", "bytewise")...)
		if code != 0 || !strings.Contains(out, "200 OK") || !strings.Contains(out, `"Target":"/bytewise"`) {
			t.Errorf("exit code %d: %s", code, out)
		}
	})
}
