// Package world is what end-to-end tests stand on: the built command, a lab of
// two hosts with an agent each, real programs on them, and puppets, which are
// small processes that do with sockets exactly what a test says.
//
// A test binary that uses it begins with [Main], which also lets the binary
// play the puppets.
package world

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/test/nettest"
	"ringfence.dev/tools/ringfence/lab"
)

// Captures are the ways of capturing that every test runs with.
var Captures = []string{"ebpf", "iptables"}

// Addresses of host b, one of each family.
var Addresses = []string{"192.0.2.2", "2001:db8::2"}

// World is a lab with what a test runs in it.
type World struct {
	*lab.Lab
	T testing.TB
	// Capture is ebpf or iptables.
	Capture string
	// Files is a directory for what programs need, gone at the end.
	Files string
}

var serial atomic.Uint32

// ForEach runs a test with each way of capturing, in a lab of its own each.
func ForEach(t *testing.T, o lab.Options, test func(*testing.T, *World)) {
	nettest.RequireRoot(t)
	for _, c := range Captures {
		t.Run(c, func(t *testing.T) {
			o := o
			o.Capture = c
			test(t, Up(t, o))
		})
	}
}

// Up brings up a lab that nobody else uses, and takes it down at the end of the test.
func Up(t testing.TB, o lab.Options) *World {
	t.Helper()
	nettest.RequireRoot(t)
	o.Name = fmt.Sprintf("t%d-%d", os.Getpid(), serial.Add(1))
	if o.Binary == "" {
		o.Binary = Binary(t)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	l, err := lab.Up(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	w := &World{Lab: l, T: t, Capture: l.Options().Capture, Files: t.TempDir()}
	t.Cleanup(func() {
		w.tell()
		if err := l.Down(context.Background()); err != nil {
			t.Error("lab down:", err)
		}
	})
	return w
}

// In is the world in the hands of a subtest, whose failures are its own and at
// whose end its programs end.
func (w *World) In(t testing.TB) *World {
	sub := *w
	sub.T, sub.Files = t, t.TempDir()
	return &sub
}

// tell fails the test for what an agent must never print, and logs what the
// agents have to say about another failure.
func (w *World) tell() {
	for _, h := range []string{"a", "b"} {
		a, ok := w.Agent(h)
		if !ok {
			continue
		}
		log := a.Tail(100000)
		if strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic:") {
			w.T.Errorf("agent of host %s:\n%s", h, log)
		} else if w.T.Failed() {
			w.T.Logf("agent of host %s:\n%s", h, a.Tail(25))
			w.T.Logf("its last decisions:\n%s", w.Ringfence(h, "decisions", "-n", "10").Out)
		}
	}
}

// Result is how a program ended.
type Result struct {
	Out  string // both streams
	Code int
}

// Ringfence runs the command under test against a host's agent.
func (w *World) Ringfence(host string, args ...string) Result {
	w.T.Helper()
	cmd := exec.Command(w.Options().Binary, args...)
	cmd.Env = append(os.Environ(), "RINGFENCE_SOCKET="+w.Socket(host))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.T.Fatalf("ringfence %v: %v", args, err)
	}
	return Result{string(out), cmd.ProcessState.ExitCode()}
}

// JSON runs the command under test with -o json and reads its answer into v.
func (w *World) JSON(host string, v any, args ...string) {
	w.T.Helper()
	r := w.Ringfence(host, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(r.Out), v); err != nil {
		w.T.Fatalf("ringfence %v: exit code %d, %v:\n%s", args, r.Code, err, r.Out)
	}
}

// Status is `ringfence status -o json`.
func (w *World) Status(host string) (s admin.Status) {
	w.T.Helper()
	w.JSON(host, &s, "status")
	return s
}

// Decisions lists a host's decisions, newest first.
func (w *World) Decisions(host string, args ...string) (all []decisionlog.Record) {
	w.T.Helper()
	w.JSON(host, &all, append([]string{"decisions", "-n", "1000"}, args...)...)
	return all
}

// Start starts a program and ends it with the test. Its output is in a file, see [World.Log].
func (w *World) Start(host, unit string, argv ...string) *exec.Cmd {
	w.T.Helper()
	log, err := os.Create(filepath.Join(w.Files, unit+".log"))
	if err != nil {
		w.T.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := w.Lab.Start(host, unit, cmd); err != nil {
		w.T.Fatal(err)
	}
	w.T.Cleanup(func() { end(cmd) })
	return cmd
}

func end(cmd *exec.Cmd) {
	_ = cmd.Process.Signal(syscall.SIGTERM)
	timer := time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() })
	_ = cmd.Wait()
	timer.Stop()
}

// Serve starts a server and returns once its port is open.
func (w *World) Serve(host, unit string, port uint16, argv ...string) *exec.Cmd {
	w.T.Helper()
	cmd := w.Start(host, unit, argv...)
	if err := w.WaitListening(w.T.Context(), host, port); err != nil {
		w.T.Fatalf("%s: %v: %s", unit, err, w.Log(unit))
	}
	return cmd
}

// Log is what a program started with [World.Start] printed so far.
func (w *World) Log(unit string) string {
	w.T.Helper()
	out, err := os.ReadFile(filepath.Join(w.Files, unit+".log"))
	if err != nil {
		w.T.Fatal(err)
	}
	return string(out)
}

// runWithin bounds a program that runs to its end.
const runWithin = 40 * time.Second

// Run runs a program to its end.
func (w *World) Run(host, unit string, argv ...string) Result {
	w.T.Helper()
	return w.Feed("", host, unit, argv...)
}

// Feed is Run with something to read for the program.
func (w *World) Feed(stdin, host, unit string, argv ...string) Result {
	w.T.Helper()
	ctx, cancel := context.WithTimeout(w.T.Context(), runWithin)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var both bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &both, &both
	if err := w.Lab.Start(host, unit, cmd); err != nil {
		w.T.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		w.T.Fatalf("%v: %v", argv, err)
	}
	if ctx.Err() != nil {
		w.T.Fatalf("%v did not end in %v: %s", argv, runWithin, &both)
	}
	return Result{both.String(), cmd.ProcessState.ExitCode()}
}

// Curl gets a URL as curl does, without ever following a proxy of the
// environment. The last line of the output is the status code, 000 for none.
func (w *World) Curl(host, unit string, args ...string) Result {
	w.T.Helper()
	return w.Run(host, unit, append([]string{"curl", "-sS", "-g", "--noproxy", "*", "--path-as-is", "--max-time", "15", "-w", `\n%{http_code}`}, args...)...)
}

// Program finds a program. Where it is missing the test is skipped, or fails if nothing may be skipped.
func Program(t testing.TB, name string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name, "/usr/local/sbin/" + name} {
		if path, err := exec.LookPath(p); err == nil {
			return path
		}
	}
	if os.Getenv(nettest.RootTestsEnv) == "1" {
		t.Fatalf("%s is not installed", name)
	}
	t.Skipf("%s is not installed", name)
	return ""
}

// Policies writes a policy file into a directory of its own and returns that.
func Policies(t testing.TB, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "test.cedar"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Configure changes a host's agent's settings, by their names in the file. They
// count from its next start, see [lab.Lab.Restart].
func (w *World) Configure(host string, change func(settings map[string]any)) {
	w.T.Helper()
	path := filepath.Join(w.Dir(), host, "agent.yaml")
	data, err := os.ReadFile(path)
	if err != nil {
		w.T.Fatal(err)
	}
	settings := map[string]any{}
	if err := yaml.Unmarshal(data, &settings); err != nil {
		w.T.Fatal(err)
	}
	change(settings)
	if data, err = yaml.Marshal(settings); err != nil {
		w.T.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		w.T.Fatal(err)
	}
}
