package decisionlog

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"ringfence.dev/policy/authz"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func sample() Record {
	return Record{
		Time: time.Date(2026, 11, 22, 10, 0, 0, 123456789, time.UTC), ID: authz.ID{Conn: [12]byte{1, 2}, Seq: 3},
		Scope: "host", Side: authz.Ingress, Mode: authz.Enforce, Effect: authz.Deny,
		Principal: "spiffe://lab.test/ns/a/sa/curl", Source: netip.MustParseAddrPort("[2001:db8::1]:40000"),
		Destination: netip.MustParseAddrPort("192.0.2.2:80"), Unit: "curl.service", Exe: "/usr/bin/curl", PID: 7, UID: 1000,
		Mesh: true, Action: "GET", Resource: "spiffe://lab.test/ns/b/sa/nginx", Method: "GET", Host: "nginx", Path: "/a", Upgrade: "websocket",
		Policies: []string{"a.cedar#1", "b"}, Reason: "no", DryRunEffect: "permit", DryRunPolicies: []string{"c"}, Version: "0123",
	}
}

func TestRecordRoundTrip(t *testing.T) {
	for name, r := range map[string]Record{"full": sample(), "bare": {Time: time.Unix(0, 0).UTC(), Side: authz.Local}} {
		line := appendRecord(nil, &r)
		if !bytes.HasSuffix(line, []byte("}\n")) || bytes.Count(line, []byte("\n")) != 1 || !json.Valid(line) {
			t.Fatalf("%s: %q", name, line)
		}
		got, err := ParseRecord(line)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		marshalled, err := json.Marshal(r)
		if err != nil || string(marshalled)+"\n" != string(line) {
			t.Errorf("%s: marshals to %s, %v", name, marshalled, err)
		}
	}
}

func TestParseRecordRefuses(t *testing.T) {
	line := string(appendRecord(nil, new(sample())))
	for _, bad := range []string{"", "{", "[]", strings.Replace(line, `"ingress"`, `"inside"`, 1),
		strings.Replace(line, `"deny"`, `"maybe"`, 1), strings.Replace(line, "192.0.2.2:80", "x", 1)} {
		if _, err := ParseRecord([]byte(bad)); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

// What a peer chose must neither break a line nor act on the terminal of who reads it.
func TestHostileText(t *testing.T) {
	for _, s := range []string{"\"", "\\", "\n", "\r\n", "\x00", "\x1b[2J", "\x7f", "\u0085", "\u009b31m", "\u2028", "\u202e", "\u2066", "\ufeff", "\xff", "a\xc3", "é€😀", `{"a":1}`} {
		b := appendString(nil, s)
		var back string
		if err := json.Unmarshal(b, &back); err != nil || back != strings.ToValidUTF8(s, "\ufffd") {
			t.Errorf("%q: %s gives %q, %v", s, b, back, err)
		}
		for _, c := range string(b) {
			if c < 0x20 || c == 0x7f || acts(c) {
				t.Errorf("%q: %s holds %q", s, b, c)
			}
		}
	}
}

func TestLongTextIsCut(t *testing.T) {
	for _, s := range []string{strings.Repeat("a", 100_000), strings.Repeat("€", 10_000), "a" + strings.Repeat("é", 10_000), strings.Repeat("\x80", 10_000)} {
		var back string
		if err := json.Unmarshal(appendString(nil, s), &back); err != nil {
			t.Fatal(err)
		}
		if len(back) > 3*maxText || strings.HasPrefix(s, "a") && !strings.HasPrefix(s, back) {
			t.Errorf("%.20q became %d bytes ending in %q", s, len(back), back[max(0, len(back)-6):])
		}
	}
}

func FuzzAppendString(f *testing.F) {
	f.Add("a\"\\\n\x00é\xff\u2028")
	f.Fuzz(func(t *testing.T, s string) {
		b := appendString(nil, s)
		var back string
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatalf("%q: %s: %v", s, b, err)
		}
		if !utf8.Valid(b) || bytes.ContainsAny(b, "\n\r\x1b\x00") {
			t.Fatalf("%q: %q", s, b)
		}
		if len(s) <= maxText && back != strings.ToValidUTF8(s, "\ufffd") && utf8.ValidString(s) {
			t.Fatalf("%q came back as %q", s, back)
		}
	})
}

func TestEncodingDoesNotAllocate(t *testing.T) {
	r, b := sample(), make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(100, func() { b = appendRecord(b[:0], &r) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRecord(b *testing.B) {
	l, err := New(Config{})
	if err != nil {
		b.Fatal(err)
	}
	r := sample()
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Record(&r); err != nil {
			b.Fatal(err)
		}
	}
}
