package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	s, err := parse([]string{"--quick", "--peers", "direct,haproxy", "--loads", "close"}, new(bytes.Buffer))
	if err != nil || s.window != 2*time.Second || s.rounds != 1 || len(s.peers) != 2 || s.loads[0].name != "close" {
		t.Errorf("%+v, %v", s, err)
	}
	for _, args := range [][]string{
		{"--peers", "envoy"}, {"--loads", ""}, {"--rounds", "0"}, {"--seconds", "0"}, {"rest1"}, {"--nonsense"},
	} {
		if _, err := parse(args, new(bytes.Buffer)); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}

func TestParseOutcome(t *testing.T) {
	good := "Running 2s test\n\nRESULT {\"requests\":1000,\"bytes\":150000,\"duration_us\":2000000,\"connect\":0,\"read\":1,\"write\":0,\"status\":0,\"timeout\":2,\"p50_us\":104,\"p99_us\":900}\n"
	o, err := parseOutcome(good)
	if err != nil || o.Requests != 1000 || o.errors() != 3 || o.P50 != 104 || o.P99 != 900 {
		t.Errorf("%+v, %v", o, err)
	}
	for _, text := range []string{
		"", "unable to connect to 192.0.2.2:80", "\nRESULT not json",
		strings.Replace(good, "1000,", "0,", 1), strings.Replace(good, `"status":0`, `"status":9`, 1),
	} {
		if _, err := parseOutcome(text); err == nil {
			t.Errorf("%q is taken for a measurement", text)
		}
	}
}

// The script must be understood by the wrk that is installed.
func TestReportScript(t *testing.T) {
	wrk, err := exec.LookPath("wrk")
	if err != nil {
		t.Skip("wrk is not installed")
	}
	server := listen(t)
	script := filepath.Join(t.TempDir(), "report.lua")
	if err := os.WriteFile(script, []byte(reportScript), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(wrk, "-t1", "-c2", "-d1s", "-s", script, "http://"+server+"/").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	o, err := parseOutcome(string(out))
	if err != nil || o.errors() != 0 || o.Bytes == 0 || o.P50 <= 0 || o.P99 < o.P50 {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestMedians(t *testing.T) {
	r := result{Rounds: []round{
		{CPUNanos: 30_000, Requests: 1, Seconds: 1, P50: 9, Errors: 1},
		{CPUNanos: 100_000, Requests: 10, Seconds: 1, P50: 7, Errors: 1},
		{CPUNanos: 20_000, Requests: 1, Seconds: 1, P50: 8},
	}}
	r.summarise()
	if r.CPU != 20 || r.CPUNanos != 20_000 || r.Requests != 1 || r.P50 != 8 || r.Errors != 2 {
		t.Errorf("%+v", r)
	}
	r = result{Rounds: r.Rounds[:2]}
	r.summarise()
	if r.CPU != 20 || r.Rate != 5.5 {
		t.Errorf("of two rounds: %+v", r)
	}
}

// The names below are a contract with those who read the file.
func TestJSON(t *testing.T) {
	r := &result{Peer: "haproxy", Load: "rest64", Rounds: []round{{CPUNanos: 1000, Requests: 1, Seconds: 1}}}
	r.summarise()
	path := filepath.Join(t.TempDir(), "build", "bench.json")
	if err := writeJSON(path, map[string]*result{"x": r}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var list []map[string]any
	if err := json.Unmarshal(data, &list); err != nil || len(list) != 1 {
		t.Fatal(err, string(data))
	}
	for _, key := range []string{
		"peer", "load", "cpu_us_per_request", "requests_per_s", "p50_us", "p99_us", "rss_bytes",
		"errors", "cpu_ns", "requests", "seconds", "bytes", "rounds",
	} {
		if _, ok := list[0][key]; !ok {
			t.Errorf("%s is missing in %s", key, data)
		}
	}
	if rounds, ok := list[0]["rounds"].([]any); !ok || len(rounds) != 1 {
		t.Errorf("rounds: %v", list[0]["rounds"])
	}
}

func TestTable(t *testing.T) {
	s := settings{rounds: 3, window: 5 * time.Second, peers: allPeers, loads: allLoads[1:2]}
	results := map[string]*result{
		"haproxy/rest64":        {Peer: "haproxy", Load: "rest64", CPU: 50, Rate: 1000},
		"ringfence-ebpf/rest64": {Peer: "ringfence-ebpf", Load: "rest64", CPU: 20, Rate: 2000, round: round{Errors: 4}},
		"direct/rest64":         {Peer: "direct", Load: "rest64", Rate: 8000},
	}
	var out bytes.Buffer
	writeTables(&out, s, results)
	rows := map[string][]string{}
	for line := range strings.Lines(out.String()) {
		if f := strings.Fields(line); len(f) > 1 {
			rows[f[0]] = f[1:]
		}
	}
	if got := rows["ringfence-ebpf"]; len(got) != 9 || got[1] != "0.40" || got[3] != "2.00" || got[8] != "4" {
		t.Errorf("row %q in\n%s", got, &out)
	}
	if got := rows["direct"]; len(got) != 9 || got[0] != "-" || got[1] != "-" || got[3] != "8.00" {
		t.Errorf("row %q in\n%s", got, &out)
	}
	if rows["nginx"] != nil {
		t.Error("a peer that was not measured has a row")
	}
}

func TestCPUTimeCountsEndedThreads(t *testing.T) {
	before, err := look([]int{os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		for end := time.Now().Add(60 * time.Millisecond); time.Now().Before(end); {
		}
	}()
	<-done
	after, err := look([]int{os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	cpu, busy, err := after.since(before)
	if err != nil || cpu < 10*time.Millisecond || cpu > 5*time.Second || busy < 0 {
		t.Errorf("60 ms of work show as %v, of the machine %v (%v)", cpu, busy, err)
	}
}

func TestUsageOfVanishedProcess(t *testing.T) {
	before := usage{processes: map[int]time.Duration{1: 5, 2: 5}}
	if _, _, err := (usage{processes: map[int]time.Duration{1: 9}}).since(before); err == nil {
		t.Error("a process that ended in the window goes unnoticed")
	}
	cpu, _, err := (usage{processes: map[int]time.Duration{1: 9, 2: 5, 3: 7}}).since(before)
	if err != nil || cpu != 11 {
		t.Errorf("%v, %v; want a new child's time counted in full", cpu, err)
	}
	if _, err := look([]int{1 << 22}); err == nil {
		t.Error("a process that cannot exist (PID_MAX_LIMIT) has used time")
	}
}

func TestTreeHoldsChildren(t *testing.T) {
	child := exec.Command("sleep", "100")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { child.Process.Kill(); child.Wait() }()
	pids, err := tree([]int{os.Getpid()})
	if err != nil || !slices.Contains(pids, child.Process.Pid) {
		t.Errorf("%v does not hold child %d (%v)", pids, child.Process.Pid, err)
	}
	rss, err := residentSet([]int{os.Getpid()})
	if err != nil || rss < 1<<20 {
		t.Errorf("memory %d (%v)", rss, err)
	}
}

func TestParseBusy(t *testing.T) {
	got, err := parseBusy("cpu  100 1 20 9000 50 3 6 77 0 0")
	if err != nil || got != 1300*time.Millisecond {
		t.Errorf("%v, %v", got, err)
	}
	for _, line := range []string{"", "cpu 1 2", "cpu0 1 2 3 4 5 6 7 8", "cpu a b c d e f g h"} {
		if _, err := parseBusy(line); err == nil {
			t.Errorf("%q is accepted", line)
		}
	}
}

func TestPKI(t *testing.T) {
	dir := t.TempDir()
	if err := writePKI(dir); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("no CA certificate")
	}
	for _, host := range []string{"a", "b"} {
		file := filepath.Join(dir, host+".pem")
		pair, err := tls.LoadX509KeyPair(file, file)
		if err != nil {
			t.Fatal(err)
		}
		for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			_, err := pair.Leaf.Verify(x509.VerifyOptions{
				Roots: roots, DNSName: host + ".bench.test", KeyUsages: []x509.ExtKeyUsage{usage},
			})
			if err != nil {
				t.Error(host, err)
			}
		}
	}
}
