package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/doctor"
	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var now = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

// golden holds text to a file, whose diff reviewers read.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (run with -update and read the diff):\n%s", path, got)
	}
}

func fullStatus() admin.Status {
	s := admin.Status{
		Version: "v1", Instance: "default", PID: 7, Started: now.Add(-90 * time.Minute), Host: "node-1", TrustDomain: "example.org",
		Capture: "iptables", CaptureReason: "no eBPF", Ready: true, Problems: []string{"the policy files changed but were not loaded"},
		Decisions: admin.Decisions{Permit: 3, Deny: 2, WouldDeny: 1}, Policy: admin.Policy{Dir: "/etc/ringfence/policies", Count: 4},
		Scopes: []admin.Scope{
			{Name: "host", Host: true, Mode: authz.Watch},
			{Name: "web", Path: "/run/netns/web", Mode: authz.Enforce, Protected: true, Limits: []string{"callers are found after the fact"}},
			{Name: "db", Path: "/run/netns/db", Mode: authz.DryRun, Problems: []string{"IPv6 is open", "rules were removed"},
				Uncovered: make([]admin.Uncovered, 2), Limits: []string{"callers are found after the fact", "something else"}},
		},
		Workloads: []admin.Workload{
			{Scope: "web", Name: "nginx", ID: "spiffe://example.org/ns/node-1/sa/nginx", Listening: []string{"0.0.0.0:80", "[::]:80"}},
			{Scope: "web", Name: "0.0.0.0:99", Listening: []string{"0.0.0.0:99"}, Problem: "held by two"},
		},
		Connections: []admin.Connection{{Decision: "d-1", Source: "192.0.2.1:4000", DestID: "spiffe://example.org/a", Carrier: "tunnel", Protocol: "http/1.1", Requests: 12}},
		Peers:       []admin.Peer{{Scope: "web", Addr: "192.0.2.2", Agent: "yes", ID: "spiffe://example.org/b", Tunnels: 1, Streams: 2}},
		Counters:    map[string]int64{"kernel_watched": 5, "kernel_refused": 0, "requests": 12},
		Observations: []admin.Observation{
			{Scope: "host", Workload: "curl", Direction: "outbound", Peer: "192.0.2.9:443", Count: 3, Last: now.Add(-2 * time.Second), Note: "left alone"},
		},
		ObservationsForgotten: 6,
	}
	for range maxRows {
		s.Observations = append(s.Observations, admin.Observation{Scope: "host", Workload: "scan", Direction: "inbound", Peer: "192.0.2.8", Count: 1, Last: now})
	}
	return s
}

func TestStatusPage(t *testing.T) { golden(t, "status.golden", renderStatus(fullStatus(), now)) }

func TestStatusPageOfAnIdleAgent(t *testing.T) {
	golden(t, "idle.golden", renderStatus(admin.Status{Host: "node-1", TrustDomain: "example.org", Capture: "ebpf", CaptureReason: "all is there", Started: now}, now))
}

// hostile is what a program may be called: it would clear the screen, draw
// another row and turn the line around.
const hostile = "a\x1b[2J\nweb\thost\tyes\u202eb\xff\u0085"

// What peers and programs choose never reaches the terminal as it is.
func TestNothingHostileIsPrinted(t *testing.T) {
	s := fullStatus()
	s.CaptureReason, s.Problems = hostile, []string{hostile}
	s.Scopes = []admin.Scope{{Name: hostile, Path: hostile, Problems: []string{hostile}, Limits: []string{hostile}}}
	s.Workloads = []admin.Workload{{Name: hostile, Problem: hostile, Listening: []string{hostile}}}
	s.Observations = []admin.Observation{{Workload: hostile, Peer: hostile, Note: hostile}}
	s.Connections = []admin.Connection{{Decision: hostile, SourceID: hostile, DestID: hostile}}
	s.Peers = []admin.Peer{{ID: hostile}}
	s.Counters = map[string]int64{"kernel_" + hostile: 1}

	var explained, report bytes.Buffer
	printExplanation(&explained, policy.Explanation{
		Record: decisionlog.Record{Reason: hostile, Principal: hostile, Resource: hostile, Path: hostile, Host: hostile, Method: "GET", Unit: hostile, PID: 1},
		Note:   hostile, Policies: []policy.Explained{{ID: hostile, Place: hostile, Clause: hostile, Error: hostile, Annotations: map[string]string{"reason": hostile}}},
	})
	printReport(&report, doctor.Report{Checks: []doctor.Check{{Group: "host", Name: hostile, Detail: hostile, Cost: hostile, Fix: hostile}}})

	for what, page := range map[string]string{"status": renderStatus(s, now), "explain": explained.String(), "doctor": report.String()} {
		if strings.Contains(page, "\nweb") || strings.Contains(page, "\xff") {
			t.Errorf("%s: a row of somebody else's making:\n%q", what, page)
		}
		for _, r := range page {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("%s: %U on the terminal", what, r)
			}
		}
	}
}

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "nginx-1.2": "nginx-1.2", "ümläut 日本": "ümläut 日本", "a\tb": `a\tb`, "\x1b[1m": `\x1b[1m`, "\x00": `\x00`,
	} {
		if got := plain(in); got != want {
			t.Errorf("plain(%q) = %q", in, got)
		}
	}
}

// serving answers as an agent would.
func serving(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	return path
}

// command runs the command line against a socket.
func runWith(t *testing.T, ctx context.Context, socket string, args ...string) (code int, out, errs string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code = run(ctx, env{args: args, stdout: &stdout, stderr: &stderr, getenv: func(string) string { return socket }})
	return code, stdout.String(), stderr.String()
}

func TestStatusJSONIsTheAgentsOwn(t *testing.T) {
	socket := serving(t, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte(`{"of_a_later_version":"<&>"}`)) })
	code, out, _ := runWith(t, t.Context(), socket, "status", "-o", "json")
	if code != 0 || strings.TrimSpace(out) != "{\n  \"of_a_later_version\": \"<&>\"\n}" {
		t.Errorf("%d %q", code, out)
	}
}

// --watch goes on until it is interrupted, and that is no failure.
func TestStatusWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	asked := 0
	socket := serving(t, func(w http.ResponseWriter, r *http.Request) {
		if asked++; asked == 2 {
			cancel()
		}
		json.NewEncoder(w).Encode(fullStatus())
	})
	code, out, errs := runWith(t, ctx, socket, "status", "--watch")
	if code != 0 || !strings.Contains(out, "SCOPE") || errs != "" || strings.Contains(out, "\x1b") {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

func TestCheckReport(t *testing.T) {
	r := admin.CheckReport{Scope: "web", Peer: "b", Steps: []admin.CheckStep{
		{Name: "name", OK: true, Detail: "b is 192.0.2.2"}, {Name: "reachability", Detail: "refused", Fix: "start one"}}}
	socket := serving(t, func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Query().Get("peer") != "b" {
			t.Errorf("asked for %s", req.URL)
		}
		json.NewEncoder(w).Encode(r)
	})
	code, out, _ := runWith(t, t.Context(), socket, "check", "--peer", "b")
	if code != 1 || !strings.Contains(out, "ok    name") || !strings.Contains(out, "FAIL  reachability") || !strings.Contains(out, "to mend it:            start one") {
		t.Errorf("%d\n%s", code, out)
	}
	r.OK = true
	if code, out, _ = runWith(t, t.Context(), socket, "check", "--peer", "b", "-o", "json"); code != 0 || !strings.Contains(out, `"ok": true`) {
		t.Errorf("%d\n%s", code, out)
	}
}

// A name is one segment of a path whatever is in it.
func TestNamesAreEscaped(t *testing.T) {
	var asked []string
	socket := serving(t, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.URL.EscapedPath())
		w.WriteHeader(http.StatusNoContent)
	})
	for _, args := range [][]string{{"scope", "remove", "../status"}, {"scope", "mode", "a?b", "watch"}, {"peer", "clear", "2001:db8::1"}} {
		if code, _, errs := runWith(t, t.Context(), socket, args...); code != 0 {
			t.Errorf("%v: %d %s", args, code, errs)
		}
	}
	want := "DELETE /v1/scopes/..%2Fstatus PUT /v1/scopes/a%3Fb/mode/watch DELETE /v1/peers/2001:db8::1"
	if got := strings.Join(asked, " "); got != want {
		t.Errorf("asked %s", got)
	}
}

// What a running agent knows is part of what doctor says.
func TestDoctorAsksTheAgent(t *testing.T) {
	checks := inUse(fullStatus())
	var texts []string
	for _, c := range checks {
		texts = append(texts, c.Name+": "+c.Detail)
	}
	all := strings.Join(texts, "\n")
	for _, want := range []string{"capture in use: iptables: no eBPF", "problem: the policy files", "scope db: IPv6 is open", "scope db: 2 connections", "limit: callers are found"} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not in\n%s", want, all)
		}
	}
}
