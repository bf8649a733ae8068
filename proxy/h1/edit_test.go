package h1

import (
	"strings"
	"testing"
)

func TestAddsFirstAndStrips(t *testing.T) {
	const in = "POST /a HTTP/1.1\r\n" +
		"X-Forwarded-Client-Cert: forged\r\n" +
		"Host: a.test\r\n" +
		"x_forwarded_client_cert: forged\r\n" +
		"X.Forwarded.Client.Cert: forged\r\n" +
		"Keep:  me \r\n" +
		"traceparent: old\r\n" +
		"Transfer-Encoding: chunked\r\n" +
		"RINGFENCE-DECISION: forged\r\n\r\n" +
		"5;x=y\r\nhello\r\n0\r\nX-Forwarded-Client-Cert: forged\r\nX-Sum: 1\r\nx_forwarded-client_cert: forged\r\nTraceparent: old\r\n\r\n"
	const want = "POST /a HTTP/1.1\r\n" +
		"X-Forwarded-Client-Cert: By=spiffe://t/b;Hash=0102;URI=spiffe://t/a\r\n" +
		"Host: a.test\r\n" +
		"Keep:  me \r\n" +
		"Transfer-Encoding: chunked\r\n\r\n" +
		"5;x=y\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"
	line := AppendXFCC(nil, "spiffe://t/b", "spiffe://t/a", []byte{1, 2})
	for _, chop := range []int{0, 1, 9} {
		w := newWorld(t, Config{Strip: NewNames(IdentityFields()...)})
		w.chop = chop
		w.decide = func(*Head) Verdict { return Verdict{Allow: true, Add: line, Strip: NewNames("Traceparent")} }
		w.client(in + in)
		w.wantServer(want + want)
	}
}

// TestAddIsCopied: a handler may reuse its buffer for the next request of the same step.
func TestAddIsCopied(t *testing.T) {
	buf, n := []byte("X-N: 0\r\n"), byte('0')
	w := newWorld(t, Config{})
	w.decide = func(*Head) Verdict {
		n++
		buf[5] = n
		return Verdict{Allow: true, Add: buf}
	}
	w.client(strings.Repeat(getA, 3))
	for _, want := range []string{"X-N: 1\r\n", "X-N: 2\r\n", "X-N: 3\r\n"} {
		if strings.Count(w.toServer.String(), want) != 1 {
			t.Errorf("no %q in %q", want, w.toServer.String())
		}
	}
}

func TestConnectionCannotStripVerdictNames(t *testing.T) {
	w := newWorld(t, Config{})
	w.decide = func(*Head) Verdict { return Verdict{Allow: true, Strip: NewNames("Txn-Token")} }
	w.client("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close, txn_token\r\n\r\n")
	w.wantServer("")
	wantRefusal(t, w, 400)
}

func TestHidingUpgradeIsTakenOut(t *testing.T) {
	for _, token := range []string{"h2c", "H2C", "websocket, h2c", "HTTP/2.0", "h2"} {
		w := newWorld(t, Config{})
		w.client("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: " + token + "\r\nHTTP2_Settings: x\r\nHTTP2-Settings: AAMAAABk\r\n\r\n" + getA)
		w.wantServer("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n" + getA)
		w.server("HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n")
		wantRefusal(t, w, 502)
	}
}

func TestXFCC(t *testing.T) {
	for _, c := range [][3]string{
		{"", "", "X-Forwarded-Client-Cert: \r\n"},
		{"", "spiffe://t/a", "X-Forwarded-Client-Cert: URI=spiffe://t/a\r\n"},
		{"a;b", "c\r\nX: \"y\"\\", "X-Forwarded-Client-Cert: By=\"a;b\";URI=\"cX: \\\"y\\\"\\\\\"\r\n"},
		{"a\r\n", "b,c", "X-Forwarded-Client-Cert: By=a;URI=\"b,c\"\r\n"},
	} {
		if got := string(AppendXFCC(nil, c[0], c[1], nil)); got != c[2] {
			t.Errorf("got %q, want %q", got, c[2])
		}
	}
}

func TestNames(t *testing.T) {
	long := strings.Repeat("Very-", 20) + "Long"
	n := NewNames("X-Forwarded-Client-Cert", long)
	for name, want := range map[string]bool{
		"x-forwarded-client-cert": true, "X_FORWARDED_CLIENT_CERT": true, "X-Forwarded-Client-Cerf": false,
		"X-Forwarded-Client-Cer": false, "": false, strings.ToLower(long): true, long + "x": false,
	} {
		if n.Has([]byte(name)) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
	if (*Names)(nil).Has([]byte("a")) {
		t.Error("a nil set has a name")
	}
}

func TestHead(t *testing.T) {
	w := newWorld(t, Config{})
	seen := 0
	w.decide = func(h *Head) Verdict {
		seen++
		var names []string
		for name, value := range h.Fields() {
			names = append(names, name+"="+value)
			if len(names) == 3 {
				break
			}
		}
		if got := strings.Join(names, ","); got != "Host=A.test:,Upgrade=WebSocket/13,X=1" {
			t.Errorf("fields %s", got)
		}
		if v, ok := h.Get("x"); v != "1" || !ok {
			t.Errorf("x = %q, %v", v, ok)
		}
		if _, ok := h.Get("y"); ok {
			t.Error("found what is not there")
		}
		if h.Form != AbsoluteForm || h.Host != "a.test" || h.Upgrade != "websocket/13" || h.Minor != 1 || h.ContentLength != -1 || h.Seq != 1 {
			t.Errorf("head %+v", h)
		}
		if !strings.HasSuffix(string(h.Raw()), "\r\n\r\n") {
			t.Errorf("raw %q", h.Raw())
		}
		return Verdict{Allow: true}
	}
	w.client("POST http://a.TEST:/ HTTP/1.1\r\nHost: A.test:\r\nUpgrade: WebSocket/13\r\nX:1\r\nX: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
	if seen != 1 {
		t.Errorf("decided %d requests: %+v", seen, w.refusals)
	}
}
