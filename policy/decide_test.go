package policy_test

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

var update = flag.Bool("update", false, "rewrite the answers in testdata/decide")

// TestDecide runs the scenarios of testdata/decide: txtar archives of policy
// files and a file "ask" of questions, whose answers stand in the file "want".
//
// A question is
//
//	[watch|dry-run|enforce] [egress|ingress|local] [plain] CALLER -> SERVICE VERB [TARGET] [host=H] [upgrade=U]
//
// with CALLER as name@ip or @ip, SERVICE as name@ip:port or @ip:port, and a name as
// group/name or a whole SPIFFE ID. VERB is connect, a method, or refuse. An answer is
//
//	EFFECT [401] [HTTP-only] [policies]: reason
//
// and, for what is not permitted, the first failing clause of up to three policies.
func TestDecide(t *testing.T) {
	files, err := filepath.Glob("testdata/decide/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) { scenario(t, file) })
	}
}

func scenario(t *testing.T, file string) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	arc := txtar.Parse(text)
	dir := t.TempDir()
	var ask, answers string
	for _, f := range arc.Files {
		switch f.Name {
		case "ask":
			ask = string(f.Data)
		case "want":
			answers = string(f.Data)
		default:
			put(t, filepath.Join(dir, f.Name), string(f.Data))
		}
	}
	log, err := decisionlog.New(decisionlog.Config{})
	if err != nil {
		t.Fatal(err)
	}
	e := engineOf(t, policy.Config{Dir: dir, Log: log, EncodedSeparators: []string{"spiffe://lab.test/ns/b/sa/files"}})
	got := answer(t, e, log, ask)
	if *update {
		setFile(arc, "want", got)
		if err := os.WriteFile(file, txtar.Format(arc), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(answers, got); diff != "" {
		t.Errorf("answers differ (-want +got), -update rewrites them:\n%s", diff)
	}
}

func setFile(arc *txtar.Archive, name, text string) {
	for i := range arc.Files {
		if arc.Files[i].Name == name {
			arc.Files[i].Data = []byte(text)
			return
		}
	}
	arc.Files = append(arc.Files, txtar.File{Name: name, Data: []byte(text)})
}

func answer(t *testing.T, e *policy.Engine, log *decisionlog.Log, ask string) string {
	t.Helper()
	var b bytes.Buffer
	for line := range strings.Lines(ask) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		q := parseQuestion(t, line)
		s := open(t, e, q.conn)
		d := q.put(t, s)
		fmt.Fprintf(&b, "%s\n    %v", line, d.Effect)
		if d.Unauthenticated {
			b.WriteString(" 401")
		}
		if s.HTTPOnly() {
			b.WriteString(" HTTP-only")
		}
		if len(d.Policies) > 0 {
			fmt.Fprintf(&b, " %v", d.Policies)
		}
		fmt.Fprintf(&b, ": %s\n", d.Reason)
		for _, rec := range log.Find(d.ID) {
			if rec.ID == d.ID {
				explainTo(&b, e.Explain(rec))
			}
		}
	}
	return b.String()
}

func explainTo(b *bytes.Buffer, x policy.Explanation) {
	if x.Record.DryRunEffect != "" {
		fmt.Fprintf(b, "    dry-run: would %s %v\n", x.Record.DryRunEffect, x.Record.DryRunPolicies)
	}
	if x.Record.Effect == authz.Permit {
		return
	}
	if x.Note != "" {
		fmt.Fprintf(b, "    note: %s\n", x.Note)
	}
	for _, p := range x.Policies[:min(3, len(x.Policies))] {
		if p.Matched {
			fmt.Fprintf(b, "    %s %s matched\n", p.Effect, p.ID)
			continue
		}
		clause := p.Clause
		if p.Part == "when" || p.Part == "unless" {
			clause = p.Part + " { " + clause + " }"
		}
		fmt.Fprintf(b, "    %s %s not: %s (%s)", p.Effect, p.ID, clause, strings.Join(p.Values, ", "))
		if p.Error != "" {
			fmt.Fprintf(b, " failed: %s", p.Error)
		}
		b.WriteByte('\n')
	}
}

type question struct {
	conn    authz.Connection
	verb    string
	request authz.Request
}

func (q *question) put(t *testing.T, s authz.Session) authz.Decision {
	switch q.verb {
	case "connect":
		return connect(t, s)
	case "refuse":
		return s.Refuse(q.request.Target)
	}
	d, err := s.Request(&q.request)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func parseQuestion(t *testing.T, line string) question {
	t.Helper()
	q := question{conn: authz.Connection{ID: authz.NewID(), Scope: "host", Mode: authz.Enforce, Side: authz.Ingress, Mesh: true}}
	before, after, ok := strings.Cut(line, " -> ")
	if !ok {
		t.Fatalf("question %q has no arrow", line)
	}
	words := strings.Fields(before)
	for _, w := range words[:len(words)-1] {
		switch w {
		case "plain":
			q.conn.Mesh = false
		case "egress", "ingress", "local":
			q.conn.Side = map[string]authz.Side{"egress": authz.Egress, "ingress": authz.Ingress, "local": authz.Local}[w]
		default:
			if err := q.conn.Mode.UnmarshalText([]byte(w)); err != nil {
				t.Fatal(err)
			}
		}
	}
	id, ip := parseEnd(t, words[len(words)-1])
	q.conn.Source.ID, q.conn.Source.Addr = id, netip.AddrPortFrom(netip.MustParseAddr(ip), 40000)
	rest := strings.Fields(after)
	id, addr := parseEnd(t, rest[0])
	q.conn.Destination = authz.Service{ID: id, Addr: netip.MustParseAddrPort(addr)}
	q.verb = rest[1]
	q.request = authz.Request{Method: q.verb, Host: "shop.lab.test"}
	for i, w := range rest[2:] {
		switch key, value, _ := strings.Cut(w, "="); {
		case i == 0:
			q.request.Target = w
		case key == "host":
			q.request.Host = value
		case key == "upgrade":
			q.request.Upgrade = value
		}
	}
	return q
}

func parseEnd(t *testing.T, text string) (spiffeid.ID, string) {
	t.Helper()
	name, addr, ok := strings.Cut(text, "@")
	if !ok {
		t.Fatalf("%q is not name@address", text)
	}
	if name == "" {
		return spiffeid.ID{}, addr
	}
	if !strings.HasPrefix(name, "spiffe://") {
		group, short, _ := strings.Cut(name, "/")
		name = "spiffe://lab.test/ns/" + group + "/sa/" + short
	}
	return spiffeid.RequireFromString(name), addr
}
