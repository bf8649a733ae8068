package traffic_test

import (
	"encoding/json"
	"os"
	"path/filepath"
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

// shopWorld is a lab under shopPolicy, with the shop on host a and web on host b.
type shopWorld struct {
	*world.World
	shop, web *world.Puppet
}

func forEachShop(t *testing.T, o lab.Options, test func(*testing.T, *shopWorld)) {
	if o.Policies == "" {
		o.Policies = world.Policies(t, shopPolicy)
	}
	world.ForEach(t, o, func(t *testing.T, w *world.World) {
		s := &shopWorld{w, w.Puppet("a", "shop"), w.Puppet("b", "web")}
		s.web.Web("[::]:80")
		test(t, s)
	})
}

// reached reports whether a target has reached the web server.
func (w *shopWorld) reached(target string) bool {
	return slices.ContainsFunc(w.web.Seen(), func(s string) bool { return strings.HasSuffix(s, " "+target) })
}

func TestPolicy(t *testing.T) {
	forEachShop(t, lab.Options{}, func(t *testing.T, w *shopWorld) {
		for name, test := range map[string]func(*testing.T, *shopWorld){
			"refusal is answered and explained": refusalExplained,
			"pipelined requests":                pipelinedRefusals,
			"spellings of a path":               spellings,
			"methods":                           methods,
			"not HTTP":                          notHTTP,
			"smuggling":                         smuggling,
			"large heads":                       largeHeads,
			"byte at a time":                    byteAtATime,
			"forged headers":                    forgedHeaders,
			"refused connection":                refusedConnection,
			"one id on both sides":              oneID,
			"other services":                    otherServices,
		} {
			t.Run(name, func(t *testing.T) { test(t, w) })
		}
	})
}

const get = "GET %s HTTP/1.1\r\nHost: web\r\n\r\n"

func request(target string) string { return strings.Replace(get, "%s", target, 1) }

func refusalExplained(t *testing.T, w *shopWorld) {
	for _, ip := range world.Addresses {
		e := dial(t, w.shop, port(ip, "80"))
		e.Send(request("/admin/users?secret=1"))
		resp, body := e.status(403)
		var problem struct {
			Status   int
			Decision string
		}
		if err := json.Unmarshal([]byte(body), &problem); err != nil || problem.Status != 403 ||
			resp.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%v: %+v %s", err, resp.Header, body)
		}
		id := resp.Header.Get("Ringfence-Decision")
		if id == "" || id != problem.Decision {
			t.Errorf("decision %q in the header, %q in the body", id, problem.Decision)
		}
		var x policy.Explanation
		w.JSON("b", &x, "explain", id)
		r := x.Record
		if r.ID.String() != id || r.Effect != authz.Deny || r.Principal != idShop || r.Resource != idWeb || r.Action != "GET" ||
			r.Path != "/admin/users" || r.Side != authz.Ingress || !r.Mesh || !x.Exact {
			t.Errorf("%+v", x)
		}
		i := slices.IndexFunc(x.Policies, func(p policy.Explained) bool { return p.ID == "shop-reads" })
		if i < 0 || x.Policies[i].Matched || x.Policies[i].Part != "unless" || !strings.Contains(x.Policies[i].Clause, "/admin*") {
			t.Errorf("the policy that came close is explained as %+v", x.Policies)
		}
		text := w.Ringfence("b", "explain", id).Out
		for _, want := range []string{id, "DENY", idShop, "shop-reads", "first failing clause", "/admin"} {
			if !strings.Contains(text, want) {
				t.Errorf("explain does not say %q:\n%s", want, text)
			}
		}
		if strings.Contains(text, "secret") {
			t.Errorf("explain shows the query:\n%s", text)
		}
		// By host, and by what is newest.
		if last := w.Ringfence("b", "explain").Out; !strings.Contains(last, id) {
			t.Errorf("the newest refusal is explained as\n%s", last)
		}
		if last := w.Ringfence("a", "explain", "--last", "--unit", "shop"); last.Code != 0 || !strings.Contains(last.Out, idShop) {
			t.Errorf("the shop's newest decision is explained as\n%s", last.Out)
		}
		if w.reached("/admin/users?secret=1") {
			t.Error("the server was reached")
		}
	}
	if r := w.Ringfence("b", "explain", "000000000000000000000000"); r.Code != 1 {
		t.Errorf("an unknown id: %+v", r)
	}
}

func pipelinedRefusals(t *testing.T, w *shopWorld) {
	e := dial(t, w.shop, "192.0.2.2:80")
	e.Send(request("/pipe/1") + request("/admin/2") + "POST /admin/3 HTTP/1.1\r\nHost: web\r\nContent-Length: 30\r\n\r\nGET /admin/4 HTTP/1.1\r\nHost: x" +
		"POST /orders/5 HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nthree\r\n0\r\n\r\n" +
		"POST /x/6 HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nthree\r\n0\r\n\r\n" + request("/pipe/7"))
	for _, want := range []int{200, 403, 403, 200, 403, 200} {
		e.status(want)
	}
	e.CloseWrite()
	e.ended()
	for target, want := range map[string]bool{"/pipe/1": true, "/admin/2": false, "/admin/3": false, "/admin/4": false, "/orders/5": true, "/x/6": false, "/pipe/7": true} {
		if w.reached(target) != want {
			t.Errorf("%s reached the server: %v", target, !want)
		}
	}
}

// However a path is spelt, policy decides the one that a server would take it for.
func spellings(t *testing.T, w *shopWorld) {
	for target, want := range map[string]int{
		"/spelt/plain": 200, "/spelt/%7Etilde": 200, "/admin%2b": 403, "/spelt/../spelt/x": 200,
		"/admin": 403, "/%61dmin/a": 403, "/%61%64%6d%69%6e/b": 403, "//admin/c": 403, "/./admin/d": 403, "/x/../admin/e": 403,
		"/x/%2e%2e/admin/f": 403, "/x/.%2e/admin/g": 403, "/x/%2E./admin/h": 403, "///x//..//admin/i": 400,
		"/x%2fy": 400, "/x%2F..%2Fadmin/j": 400, "/x%5c..%5cadmin/k": 400, `/x\..\admin/l`: 400, "/%00/admin": 400, "/x/%2": 400, "/x/%zz": 400,
		"/../admin/m": 400, "/..;/admin/n": 400, "http://web/admin/o": 403, "http://web/%61dmin/p": 403, "http://other/admin/q": 400,
		"http://web:80@evil/admin/r": 400, "/%2561dmin/s": 200, "/ad%6Din/t": 403, "/admin?x=/y": 403, "/admin#f": 400, "admin/u": 400, "*": 400,
	} {
		e := dial(t, w.shop, "192.0.2.2:80")
		e.Send(request(target))
		resp, body := e.response("GET")
		ok := resp.StatusCode == want
		if want != 200 { // which of the two refusals is a matter of taste, that it is one is not
			ok = resp.StatusCode == 403 || resp.StatusCode == 400
		}
		if !ok {
			t.Errorf("%s: status %d, want %d: %s", target, resp.StatusCode, want, body)
		}
		if w.reached(target) != (want == 200) && target != "*" {
			t.Errorf("%s reached the server: %v", target, want != 200)
		}
		_ = e.Close()
	}
}

func methods(t *testing.T, w *shopWorld) {
	for line, want := range map[string]int{
		"GET /m/1": 200, "HEAD /m/2": 200, "OPTIONS /m/3": 200, "OPTIONS *": 200, "POST /m/4": 403, "POST /orders/5": 200, "PUT /m/6": 403, "DELETE /m/7": 403,
		"PATCH /m/8": 403, "get /m/9": 403, "PROPFIND /m/10": 403, "TRACE /m/11": 403, "CONNECT web:80": 400, "G%45T /m/12": 403,
	} {
		e := dial(t, w.shop, "192.0.2.2:80")
		e.Send(line + " HTTP/1.1\r\nHost: web:80\r\n\r\n")
		method, target, _ := strings.Cut(line, " ")
		if resp, body := e.response(method); resp.StatusCode != want {
			t.Errorf("%s: status %d, want %d: %s", line, resp.StatusCode, want, body)
		}
		if w.reached(target) != (want < 300) && target != "*" { // which Go's server answers by itself
			t.Errorf("%s reached the server: %v", line, want >= 300)
		}
		_ = e.Close()
	}
}

// refused fails unless text sent to web gets an answer other than success, or
// none, and nothing of it reaches the server.
func (w *shopWorld) refused(t *testing.T, name, text string) {
	t.Helper()
	before := len(w.web.Seen())
	e := dial(t, w.shop, "192.0.2.2:80")
	_, _ = e.Write([]byte(text)) // may be cut off while it is still being sent
	_ = e.TryCloseWrite()
	got, _ := e.Rest()
	_ = e.Close()
	if strings.Contains(got, " 200 ") || strings.Contains(got, "Go-http-server") {
		t.Errorf("%s: answered %.200q", name, got)
	}
	if got != "" && !strings.HasPrefix(got, "HTTP/1.") {
		t.Errorf("%s: the answer is not HTTP: %.200q", name, got)
	}
	if seen := w.web.Seen(); len(seen) > before {
		t.Errorf("%s: reached the server: %q", name, seen[before:])
	}
}

func notHTTP(t *testing.T, w *shopWorld) {
	for name, text := range map[string]string{
		"leading CRLF":        "\r\n" + request("/n/1"),
		"leading LF":          "\n" + request("/n/2"),
		"leading space":       " " + request("/n/3"),
		"HTTP/0.9":            "GET /n/4\r\n",
		"HTTP/0.9 and more":   "GET /n/5\r\nHost: web\r\n\r\n",
		"HTTP/2 preface":      "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
		"HTTP/1.1 lower case": "GET /n/6 http/1.1\r\nHost: web\r\n\r\n",
		"HTTP/1.2":            "GET /n/7 HTTP/1.2\r\nHost: web\r\n\r\n",
		"HTTP/2.0 line":       "GET /n/8 HTTP/2.0\r\nHost: web\r\n\r\n",
		"HTTP/01.1":           "GET /n/9 HTTP/01.1\r\nHost: web\r\n\r\n",
		"TLS client hello":    "\x16\x03\x01\x00\x2e\x01\x00\x00\x2a\x03\x03" + strings.Repeat("\x00", 37),
		"Redis inline":        "SET a b\r\n",
		"Redis GET":           "GET a\r\n",
		"RESP":                "*1\r\n$4\r\nPING\r\n",
		"SSH":                 "SSH-2.0-OpenSSH_10\r\n",
		"NUL":                 "\x00",
		"nothing but CRLF":    "\r\n\r\n",
		"PROXY protocol":      "PROXY TCP4 192.0.2.9 192.0.2.2 1 80\r\n" + request("/n/10"),
		"an unknown upgrade":  "GET /n/11 HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
	} {
		w.refused(t, name, text)
	}
	last := w.Ringfence("b", "explain", "--last")
	if !strings.Contains(last.Out, "DENY") || !strings.Contains(last.Out, "refused before any policy was asked") {
		t.Errorf("a refusal that was not a policy's is explained as\n%s", last.Out)
	}
}

// What two parsers may read in two ways must not be passed on, and what hides in it must not be served.
func smuggling(t *testing.T, w *shopWorld) {
	const hidden = "GET /admin/hidden HTTP/1.1\r\nHost: web\r\n\r\n"
	post := func(fields, body string) string {
		return "POST /orders/s HTTP/1.1\r\nHost: web\r\n" + fields + "\r\n" + body
	}
	for name, text := range map[string]string{
		"CL and TE":              post("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+hidden),
		"TE and CL":              post("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "0\r\n\r\n"+hidden),
		"two CL":                 post("Content-Length: 0\r\nContent-Length: 44\r\n", hidden),
		"two equal CL":           post("Content-Length: 1\r\nContent-Length: 1\r\n", "x"+hidden),
		"list of CL":             post("Content-Length: 0, 44\r\n", hidden),
		"signed CL":              post("Content-Length: +0\r\n", hidden),
		"negative CL":            post("Content-Length: -1\r\n", hidden),
		"hexadecimal CL":         post("Content-Length: 0x2c\r\n", hidden),
		"huge CL":                post("Content-Length: 18446744073709551617\r\n", "x"+hidden),
		"empty CL":               post("Content-Length:\r\n", hidden),
		"underscored CL":         post("Content_Length: 44\r\nTransfer-Encoding: xchunked\r\n", hidden),
		"TE identity":            post("Transfer-Encoding: identity\r\n", hidden),
		"TE chunked twice":       post("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n"+hidden),
		"TE chunked not last":    post("Transfer-Encoding: chunked, gzip\r\n", "0\r\n\r\n"+hidden),
		"TE gzip, chunked":       post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"+hidden),
		"TE with a comma":        post("Transfer-Encoding: chunked,\r\n", "0\r\n\r\n"+hidden),
		"TE in two lines":        post("Transfer-Encoding:\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+hidden),
		"TE with a tab":          post("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n"+hidden),
		"TE with parameters":     post("Transfer-Encoding: chunked;x=y\r\n", "0\r\n\r\n"+hidden),
		"TE in HTTP/1.0":         "POST /orders/s HTTP/1.0\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
		"space before the colon": post("Content-Length : 0\r\n", hidden),
		"space in a name":        post("Content Length: 0\r\n", hidden),
		"folded line":            post("X: a\r\n Content-Length: 44\r\n", hidden),
		"folded first":           "GET /orders/s HTTP/1.1\r\n Host: web\r\n\r\n",
		"bare LF":                "GET /orders/s HTTP/1.1\nHost: web\n\n",
		"one bare LF":            "GET /orders/s HTTP/1.1\r\nHost: web\nX: y\r\n\r\n",
		"bare CR":                "GET /orders/s HTTP/1.1\r\nHost: web\r\nX: a\rContent-Length: 44\r\n\r\n" + hidden,
		"NUL in a value":         "GET /orders/s HTTP/1.1\r\nHost: web\r\nX: a\x00b\r\n\r\n",
		"empty name":             "GET /orders/s HTTP/1.1\r\nHost: web\r\n: x\r\n\r\n",
		"no colon":               "GET /orders/s HTTP/1.1\r\nHost: web\r\nX\r\n\r\n",
		"two hosts":              "GET /orders/s HTTP/1.1\r\nHost: web\r\nHost: other\r\n\r\n",
		"no host":                "GET /orders/s HTTP/1.1\r\n\r\n",
		"a user in the host":     "GET /orders/s HTTP/1.1\r\nHost: web@evil\r\n\r\n",
		"space in the target":    "GET /orders/s /x HTTP/1.1\r\nHost: web\r\n\r\n",
		"two spaces":             "GET  /orders/s HTTP/1.1\r\nHost: web\r\n\r\n",
		"tab for space":          "GET\t/orders/s\tHTTP/1.1\r\nHost: web\r\n\r\n",
	} {
		w.refused(t, name, text)
	}
	// Here the head is fine, so the request has reached the server before the body turns bad: what counts is what is hidden.
	for name, body := range map[string]string{
		"chunk with bare LF":    "5\nthree\n0\n\n" + hidden,
		"chunk of minus one":    "-1\r\n\r\n0\r\n\r\n" + hidden,
		"chunk size overflow":   "10000000000000000\r\n" + hidden,
		"chunk with 0x":         "0x5\r\nthree\r\n0\r\n\r\n" + hidden,
		"chunk without CRLF":    "5\r\nthreeX0\r\n\r\n" + hidden,
		"chunk, space in size":  "5 \r\nthree\r\n0\r\n\r\n" + hidden,
		"framing in a trailer":  "0\r\nContent-Length: 44\r\n\r\n" + hidden,
		"identity in a trailer": "0\r\nX-Forwarded-Client-Cert: URI=spiffe://lab.test/ns/a/sa/king\r\n\r\n" + hidden,
	} {
		e := dial(t, w.shop, "192.0.2.2:80")
		_, _ = e.Write([]byte(post("Transfer-Encoding: chunked\r\n", body)))
		_ = e.TryCloseWrite()
		got, _ := e.Rest()
		if strings.Contains(got, "king") || w.reached("/admin/hidden") {
			t.Errorf("%s: answered %.300q", name, got)
		}
		_ = e.Close()
	}
}

func largeHeads(t *testing.T, w *shopWorld) {
	e := dial(t, w.shop, "192.0.2.2:80")
	e.Send("GET /large/1 HTTP/1.1\r\nHost: web\r\nX-Long: " + strings.Repeat("x", 40<<10) + "\r\n\r\n")
	e.status(200)
	_, _ = e.Write([]byte("GET /large/2 HTTP/1.1\r\nHost: web\r\nX-Long: " + strings.Repeat("x", 1<<20) + "\r\n\r\n"))
	e.status(431)
	e.ended()
	e = dial(t, w.shop, "192.0.2.2:80")
	_, _ = e.Write([]byte("GET /large/3 HTTP/1.1\r\nHost: web\r\n" + strings.Repeat("X: y\r\n", 1<<14) + "\r\n"))
	e.status(431)
	e = dial(t, w.shop, "192.0.2.2:80")
	_, _ = e.Write([]byte("GET /large/" + strings.Repeat("x", 1<<20) + " HTTP/1.1\r\nHost: web\r\n\r\n"))
	if resp, _ := e.response("GET"); resp.StatusCode != 414 && resp.StatusCode != 431 {
		t.Errorf("a target of 1 MiB: status %d", resp.StatusCode)
	}
	if w.reached("/large/2") || w.reached("/large/3") {
		t.Error("the server was reached")
	}
}

func byteAtATime(t *testing.T, w *shopWorld) {
	e := dial(t, w.shop, port(world.Addresses[1], "80"))
	e.SendBytewise(request("/byte/1") + request("/admin/byte") +
		"POST /orders/byte HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nthree\r\n0\r\nX: y\r\n\r\n" + request("/byte/2"))
	for _, want := range []int{200, 403, 200, 200} {
		e.status(want)
	}
}

// Whatever a client writes in our name is gone, wherever and however it is written.
func forgedHeaders(t *testing.T, w *shopWorld) {
	const king = "URI=spiffe://lab.test/ns/a/sa/king"
	e := dial(t, w.shop, "192.0.2.2:80")
	e.Send("POST /orders/forged HTTP/1.1\r\nHost: web\r\nX-Forwarded-Client-Cert: " + king + "\r\nx_forwarded_client_cert: " + king +
		"\r\nX_Forwarded-Client_Cert: " + king + "\r\nX.Forwarded.Client.Cert: " + king + "\r\nX-FORWARDED-CLIENT-CERT: " + king + "," + king +
		"\r\nRingfence-Decision: king\r\nX-Mine: kept\r\nConnection: keep-alive\r\n" +
		"Transfer-Encoding: chunked\r\nTrailer: X-Forwarded-Client-Cert\r\n\r\n5\r\nthree\r\n0\r\nX-Forwarded-Client-Cert: " + king +
		"\r\nx_forwarded_client_cert: " + king + "\r\nX-Sum: 5\r\n\r\n")
	_, body := e.status(200)
	var seen world.SeenRequest
	if err := json.Unmarshal([]byte(body), &seen); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(body, "king") {
		t.Errorf("the server was told %s", body)
	}
	if got := seen.Header.Values("X-Forwarded-Client-Cert"); len(got) != 1 || !strings.Contains(got[0], "URI="+idShop) || !strings.Contains(got[0], "By="+idWeb) {
		t.Errorf("the server was told of its caller %q", got)
	}
	if seen.Header.Get("X-Mine") != "kept" || seen.Body != "three" {
		t.Errorf("the rest of the request arrived as %+v", seen)
	}
	// A client must not be able to make a server drop what we say either (RFC 9110 section 7.6.1).
	w.refused(t, "our header nominated in Connection",
		"GET /nominated HTTP/1.1\r\nHost: web\r\nConnection: close, X-Forwarded-Client-Cert\r\n\r\n")
}

// Who may not connect is refused before a byte passes, and the server hears nothing.
func refusedConnection(t *testing.T, w *shopWorld) {
	sub := w.In(t)
	intruder, server := sub.Puppet("a", "intruder"), sub.Puppet("b", "server")
	for _, ip := range world.Addresses {
		l := server.Listen(port(ip, "7000"))
		refusedDial(t, intruder, port(ip, "7000"))
		ok := w.shop.In(t).MustDial(port(ip, "7000")) // so that an accepted intruder would be seen first
		s := l.MustAccept()
		ok.Send("shop")
		s.Want("shop")
		_, _ = ok.Close(), s.Close()
		last := w.Ringfence("a", "explain", "--last", "--unit", "intruder")
		for _, want := range []string{"DENY", "no-intruder", "the intruder is not to be trusted", "sa/intruder"} {
			if !strings.Contains(last.Out, want) {
				t.Errorf("explain does not say %q:\n%s", want, last.Out)
			}
		}
		l.Close()
	}
}

func oneID(t *testing.T, w *shopWorld) {
	e := dial(t, w.shop, "192.0.2.2:80")
	e.Send(request("/one-id"))
	e.status(200)
	far := w.Decisions("b", "--effect", "permit")
	i := slices.IndexFunc(far, func(r decisionlog.Record) bool { return r.Path == "/one-id" })
	if i < 0 {
		t.Fatalf("no decision of host b on the request: %+v", far)
	}
	req := far[i]
	if req.ID.Seq != 1 || req.Principal != idShop || req.Resource != idWeb || req.Method != "GET" || req.Host != "web" || !slices.Contains(req.Policies, "shop-reads") ||
		req.Reason != "the shop may read all but what is for administrators" || req.Unit != "" || req.Version == "" {
		t.Errorf("the request was recorded as %+v", req)
	}
	near := w.Decisions("a", "--unit", "shop")
	j := slices.IndexFunc(near, func(r decisionlog.Record) bool { return r.ID.Conn == req.ID.Conn && r.Action == "connect" })
	if j < 0 {
		t.Fatalf("host a has no decision of the connection %v", req.ID)
	}
	if c := near[j]; c.Side != authz.Egress || c.Unit != "shop.service" || c.PID != uint32(w.shop.PID()) || c.Destination.String() != "192.0.2.2:80" || c.Source.Addr().String() != "192.0.2.1" {
		t.Errorf("the connection was recorded as %+v", c)
	}
	for _, h := range []string{"a", "b"} {
		var data []byte
		nettest.Wait(t, "host "+h+" to write its decision", func() bool {
			data, _ = os.ReadFile(filepath.Join(w.Dir(), h, "decisions.jsonl"))
			return strings.Contains(string(data), req.ID.String()[:24]) && strings.HasSuffix(string(data), "\n")
		})
		for line := range strings.Lines(string(data)) {
			var r decisionlog.Record
			if err := json.Unmarshal([]byte(line), &r); err != nil || r.ID.IsZero() || r.Time.IsZero() || r.Reason == "" || r.Action == "" {
				t.Errorf("log line of host %s (%v): %s", h, err, line)
			}
		}
	}
}

// A service that no HTTP policy is about speaks what it likes, and policy still sees who calls.
func otherServices(t *testing.T, w *shopWorld) {
	sub := w.In(t)
	sub.Puppet("b", "other").Echo("192.0.2.2:7100")
	for _, text := range []string{"\r\nGET", "SET a b\r\n", "\x16\x03\x01", "GET /x\r\n"} {
		c := w.shop.In(t).MustDial("192.0.2.2:7100")
		c.Send(text)
		c.Want(text)
		_ = c.Close()
	}
}
