package h1

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// corpusCase is one line of testdata/requests.txt.
type corpusCase struct {
	name     string
	status   int  // 0: forwarded
	requests int  // decided
	guessed  bool // Observe and Passive let it pass
	data     string
}

var repeated = regexp.MustCompile(`\{(\d+)\*([^}]*)\}`)

func corpus(t testing.TB) (cases []corpusCase) {
	t.Helper()
	text, err := os.ReadFile("testdata/requests.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		cases = append(cases, parseCase(t, line))
	}
	if len(cases) < 200 {
		t.Fatalf("only %d cases", len(cases))
	}
	return cases
}

func parseCase(t testing.TB, line string) (c corpusCase) {
	t.Helper()
	head, quoted, _ := strings.Cut(line, `"`)
	f := strings.Fields(head)
	quoted = repeated.ReplaceAllStringFunc(`"`+quoted, func(m string) string {
		part := repeated.FindStringSubmatch(m)
		n, _ := strconv.Atoi(part[1])
		return strings.Repeat(part[2], n)
	})
	data, err := strconv.Unquote(quoted)
	if err != nil || len(f) < 2 {
		t.Fatalf("%v in line %.100s", err, line)
	}
	c.name, c.data = f[0], data
	if f[1] != "ok" {
		f[1], c.guessed = strings.CutSuffix(f[1], "?")
		c.status, _ = strconv.Atoi(f[1])
	}
	if len(f) > 2 {
		c.requests, _ = strconv.Atoi(f[2])
	}
	return c
}

func TestCorpus(t *testing.T) {
	for _, c := range corpus(t) {
		t.Run(c.name, func(t *testing.T) {
			for _, chop := range []int{0, 1, 5} {
				w := newWorld(t, Config{Strip: NewNames(IdentityFields()...)})
				w.chop = chop
				w.client(c.data)
				w.clientFIN()
				checkCase(t, w, c)
			}
		})
	}
}

func checkCase(t *testing.T, w *world, c corpusCase) {
	t.Helper()
	if len(w.requests) != c.requests {
		t.Errorf("chop %d: decided %d requests, want %d: %q", w.chop, len(w.requests), c.requests, w.requests)
	}
	if c.status == 0 {
		if len(w.refusals) > 0 || w.toClient.Len() > 0 {
			t.Errorf("chop %d: refused: %+v %q", w.chop, w.refusals, w.toClient.String())
		}
		if got := w.toServer.String(); got != c.data && c.name != "ok-close-then-more" {
			t.Errorf("chop %d: the server got %.300q, want %.300q", w.chop, got, c.data)
		}
		return
	}
	if len(w.refusals) != 1 || w.refusals[0].Status != c.status || w.refusals[0].Upstream {
		t.Fatalf("chop %d: refusals %+v, want one of status %d", w.chop, w.refusals, c.status)
	}
	if !strings.HasPrefix(c.data, w.toServer.String()) {
		t.Errorf("chop %d: the server got what was not sent: %.300q", w.chop, w.toServer.String())
	}
	if c.requests == 0 {
		if got := w.toServer.String(); got != "" && (w.conn.cfg.Mode == Enforce || hasHeader(got)) {
			t.Errorf("chop %d: the server got %.300q", w.chop, got)
		}
		wantRefusal(t, w, c.status)
		return
	}
	for !w.closed && w.cut == nil && w.conn.Outstanding() > 0 {
		w.server("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	}
	wantRefusal(t, w, c.status)
}

// hasHeader reports whether a server could find a header line, or the end of
// the header. The line before may have passed while it was not known for a request's.
func hasHeader(got string) bool {
	_, rest, _ := strings.Cut(strings.TrimLeft(got, " \t\r\n"), "\n")
	return strings.ContainsAny(rest, ":\n")
}

// wantRefusal checks that the last thing the client got is a refusal, and that
// the connection ended with it.
func wantRefusal(t *testing.T, w *world, status int) {
	t.Helper()
	got := w.toClient.String()
	i := strings.LastIndex(got, "HTTP/1.1 ")
	if i < 0 || !strings.HasPrefix(got[i+9:], strconv.Itoa(status)+" ") ||
		!strings.Contains(got[i:], "\r\nConnection: close\r\n") || !strings.Contains(got[i:], "application/problem+json") {
		t.Errorf("chop %d: the client got %.300q, want %d at its end", w.chop, got, status)
	}
	if !w.closed {
		t.Errorf("chop %d: the connection goes on", w.chop)
	}
}

// TestCorpusDryRun: nothing is refused, and the server gets what the client
// sent. What an enforcing mode would refuse is reported.
func TestCorpusDryRun(t *testing.T) {
	for _, mode := range []Mode{DryRun, Passive} {
		for _, c := range corpus(t) {
			for _, chop := range []int{0, 1, 6} {
				w := newWorld(t, Config{Mode: mode, Strip: NewNames("Ringfence-Test")})
				w.chop = chop
				w.client(c.data)
				w.clientFIN()
				if w.toServer.String() != c.data || w.toClient.Len() > 0 || !w.serverEOF || w.closed {
					t.Errorf("%s, mode %d, chop %d: the server got %.300q, closed %v", c.name, mode, chop, w.toServer.String(), w.closed)
				}
				want := min(c.status, 1)
				if mode == Passive && c.guessed || strings.HasPrefix(c.name, "connection-nominates-identity") { // which is not stripped here
					want = 0
				}
				if len(w.refusals) != want || w.conn.Lax() != (want > 0 || c.name == "ok-close-then-more") {
					t.Errorf("%s, mode %d, chop %d: lax %v, refusals %+v, want %d", c.name, mode, chop, w.conn.Lax(), w.refusals, want)
				}
			}
		}
	}
}

// TestCorpusObserve: what is a request is held to the same as in Enforce, and
// the rest passes unchanged.
func TestCorpusObserve(t *testing.T) {
	for _, c := range corpus(t) {
		t.Run(c.name, func(t *testing.T) {
			for _, chop := range []int{0, 1, 6} {
				w := newWorld(t, Config{Mode: Observe, Strip: NewNames(IdentityFields()...)})
				w.chop = chop
				w.client(c.data)
				w.clientFIN()
				if !c.guessed {
					checkCase(t, w, c)
				} else if w.toServer.String() != c.data || w.toClient.Len() > 0 || w.closed || len(w.refusals) > 0 || w.conn.Lax() {
					t.Errorf("chop %d: the server got %.300q, refusals %+v", chop, w.toServer.String(), w.refusals)
				}
			}
		})
	}
}
