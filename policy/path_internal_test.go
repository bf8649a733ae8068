package policy

import (
	"errors"
	"net/url"
	"path"
	"strings"
	"testing"
)

func TestCanonicalPath(t *testing.T) {
	for _, tc := range []struct {
		raw, want string
		err       error
	}{
		{raw: "/", want: "/"},
		{raw: "/a/b", want: "/a/b"},
		{raw: "/a/b/", want: "/a/b/"},
		{raw: "//a///b//", want: "/a/b/"},
		{raw: "/./a/./b/.", want: "/a/b/"},
		{raw: "/a/../b", want: "/b"},
		{raw: "/a/b/..", want: "/a/"},
		{raw: "/a/b/../", want: "/a/"},
		{raw: "/a/b/../../c", want: "/c"},
		{raw: "/%61%2D%7e", want: "/a-~"},
		{raw: "/%2e%2E/a", err: errPathClimbs},
		{raw: "/a/%2e%2e/b", want: "/b"},
		{raw: "/a/.%2e/b", want: "/b"},
		{raw: "/%3b%3B;", want: "/;;;"},
		{raw: "/%e2%82%ac", want: "/%E2%82%AC"},
		{raw: "/€", want: "/%E2%82%AC"},
		{raw: "/a%20b", want: "/a%20b"},
		{raw: "/%252e%252e/a", want: "/%252e%252e/a"},
		{raw: "/[x]|\"<>^`{}", want: "/%5Bx%5D%7C%22%3C%3E%5E%60%7B%7D"},
		{raw: "/...", want: "/..."},
		{raw: "/..a/.b", want: "/..a/.b"},
		{raw: "", err: errPathForm},
		{raw: "a", err: errPathForm},
		{raw: "*", err: errPathForm},
		{raw: "/..", err: errPathClimbs},
		{raw: "/../a", err: errPathClimbs},
		{raw: "/a/../../b", err: errPathClimbs},
		{raw: "/a//../b", err: errPathAmbiguous},
		{raw: "/a/..//b", err: errPathAmbiguous},
		{raw: "/..;/a", err: errPathAmbiguous},
		{raw: "/a/..;x=1/b", err: errPathAmbiguous},
		{raw: "/a/.;/b", err: errPathAmbiguous},
		{raw: "/a/%2e%2e%3b/b", err: errPathAmbiguous},
		{raw: "/a%2fb", err: errPathSeparator},
		{raw: "/a%2Fb", err: errPathSeparator},
		{raw: "/a%5cb", err: errPathSeparator},
		{raw: `/a\b`, err: errPathByte},
		{raw: "/a\x00", err: errPathByte},
		{raw: "/a\tb", err: errPathByte},
		{raw: "/a b", err: errPathByte},
		{raw: "/a#b", err: errPathByte},
		{raw: "/a?b", err: errPathByte},
		{raw: "/a\x7f", err: errPathByte},
		{raw: "/%00", err: errPathNUL},
		{raw: "/%", err: errPathPercent},
		{raw: "/%4", err: errPathPercent},
		{raw: "/%4g", err: errPathPercent},
		{raw: "/%u0041", err: errPathPercent},
		{raw: "/%c0%af", err: errPathOverlong},
		{raw: "/\xc0\xae", err: errPathOverlong},
	} {
		got, err := canonicalPath(tc.raw, false)
		if got != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("%q: got %q, %v; want %q, %v", tc.raw, got, err, tc.want, tc.err)
		}
	}
}

func TestCanonicalPathWithSeparators(t *testing.T) {
	for raw, want := range map[string]string{
		"/a%2fb%5cc": "/a%2Fb%5Cc",
		"/%2f":       "/%2F",
		"/a%2f..%2f": "",
		"/..%2fa":    "",
		"/a%5c..":    "",
		"/a%2f..;b":  "",
		"/%2f.":      "",
		"/a%2f%00":   "",
		`/a\b`:       "",
	} {
		if got, err := canonicalPath(raw, true); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", raw, got, err, want)
		}
	}
}

// FuzzCanonicalPath states what must hold of every path: the form is its own
// form, stays below the root, and names what a server would resolve.
func FuzzCanonicalPath(f *testing.F) {
	for _, seed := range []string{"/", "/a/../b", "//a//", "/%2e/%2E%2e/", "/a%2f..%5c", "/;.;/..;", "/é%ff", "/a/./..//", "/%25", "/a\\", "/{a}"} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, raw string, separators bool) {
		got, err := canonicalPath(raw, separators)
		if err != nil {
			if got != "" {
				t.Fatalf("%q: an error and %q", raw, got)
			}
			return
		}
		again, err := canonicalPath(got, separators)
		if err != nil || again != got {
			t.Fatalf("%q: %q is not canonical: %q, %v", raw, got, again, err)
		}
		if !strings.HasPrefix(got, "/") || strings.Contains(got, "//") || strings.Contains(got+"/", "/../") || strings.Contains(got+"/", "/./") {
			t.Fatalf("%q: %q has empty or dot segments", raw, got)
		}
		for i := range len(got) {
			if c := got[i]; !pchar[c] && c != '/' && c != '%' {
				t.Fatalf("%q: %q holds %q", raw, got, c)
			}
		}
		for _, seg := range splitPath(got) {
			if seg == "" {
				t.Fatalf("%q: %q has an empty segment", raw, got)
			}
		}
		asServer(t, raw, got)
	})
}

// asServer compares with the way Go's own server resolves a path: decode, then clean.
func asServer(t *testing.T, raw, got string) {
	if strings.Contains(got, "%2F") {
		return // Go takes those for separators: that is why they need a setting
	}
	decoded, err := url.PathUnescape(raw)
	if err != nil {
		t.Fatalf("%q: accepted, but Go says %v", raw, err)
	}
	want := path.Clean(decoded)
	mine, err := url.PathUnescape(got)
	if err != nil {
		t.Fatalf("%q: %q does not decode: %v", raw, got, err)
	}
	if mine = strings.TrimSuffix(mine, "/"); mine != strings.TrimSuffix(want, "/") {
		t.Fatalf("%q: policy sees %q, a server resolves %q", raw, mine, want)
	}
}

func FuzzTarget(f *testing.F) {
	f.Add("GET", "/a?b", "h:80")
	f.Add("OPTIONS", "*", "")
	f.Add("CONNECT", "h:1", "h:1")
	f.Add("GET", "http://[::1]:80/a", "[::1]")
	f.Add("GET", "http://u@h/", "h")
	f.Fuzz(func(t *testing.T, method, target, host string) {
		m, err := mapRequest(&authzRequest{Method: method, Target: target, Host: host}, false)
		if err != nil {
			return
		}
		if m.path != "" && m.path != "*" {
			if canon, err := canonicalPath(m.path, false); err != nil || canon != m.path {
				t.Fatalf("%s %q: path %q is not canonical", method, target, m.path)
			}
		}
		if m.path == "" && method != "CONNECT" || m.path == "*" && method != "OPTIONS" {
			t.Fatalf("%s %q: path %q", method, target, m.path)
		}
		if strings.ContainsAny(m.host, "@/\\%?# []") || m.host != strings.ToLower(m.host) {
			t.Fatalf("host %q of %q, %q", m.host, target, host)
		}
		if err := words.validator.Request(sampleRequest(&m)); err != nil {
			t.Fatalf("%s %q: against the schema: %v", method, target, err)
		}
	})
}
