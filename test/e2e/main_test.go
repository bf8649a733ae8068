package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ringfence.dev/test/nettest"
	"ringfence.dev/tools/ringfence/lab"
)

// labName keeps these tests apart from a lab that the user has up.
const labName = "e2e"

// binary is the command under test, built once.
var binary string

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "helper" {
		os.Exit(helper(os.Args[2], os.Args[3:]))
	}
	os.Exit(build(m))
}

func build(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ringfence-e2e")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "ringfence")
	cmd := exec.Command("go", "build", "-o", binary, "ringfence.dev/tools/ringfence")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the command: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// world is the lab with what a test runs in it.
type world struct {
	*lab.Lab
	t       *testing.T
	capture string
	files   string
}

// forEachCapture runs a test in each mode, each in a lab of its own.
func forEachCapture(t *testing.T, o lab.Options, test func(*testing.T, *world)) {
	nettest.RequireRoot(t)
	for _, capture := range []string{"ebpf", "iptables"} {
		t.Run(capture, func(t *testing.T) {
			o.Capture = capture
			test(t, up(t, o))
		})
	}
}

func up(t *testing.T, o lab.Options) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	o.Name, o.Binary = labName, binary
	if err := lab.Down(ctx, labName, binary); err != nil { // of a run that was killed
		t.Fatal(err)
	}
	l, err := lab.Up(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Lab: l, t: t, capture: o.Capture, files: t.TempDir()}
	t.Cleanup(func() {
		if t.Failed() {
			w.tell()
		}
		if err := l.Down(context.Background()); err != nil {
			t.Error("lab down:", err)
		}
	})
	return w
}

// tell logs what the agents have to say about a failure.
func (w *world) tell() {
	for _, h := range []string{"a", "b"} {
		a, ok := w.Agent(h)
		if !ok {
			continue
		}
		w.t.Logf("agent of host %s:\n%s", h, a.Tail(15))
		if a.PID() != 0 {
			w.t.Logf("its last decision:\n%s", w.ringfence(h, "explain", "--last"))
		}
	}
}

// ringfence runs the command under test against a host's agent.
func (w *world) ringfence(host string, args ...string) string {
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "RINGFENCE_SOCKET="+w.Socket(host))
	out, err := cmd.CombinedOutput()
	if err != nil {
		out = fmt.Appendf(out, "(%v)", err)
	}
	return string(out)
}

// serve starts a server as a unit and waits for its port.
func (w *world) serve(host, unit string, port uint16, argv ...string) *exec.Cmd {
	w.t.Helper()
	log, err := os.Create(filepath.Join(w.files, unit+".log"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := w.Start(host, unit, cmd); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
	})
	if err := w.WaitListening(w.t.Context(), host, port); err != nil {
		out, _ := os.ReadFile(log.Name())
		w.t.Fatalf("%s: %v: %s", unit, err, out)
	}
	return cmd
}

// log returns what a server printed so far.
func (w *world) log(unit string) string {
	out, err := os.ReadFile(filepath.Join(w.files, unit+".log"))
	if err != nil {
		w.t.Fatal(err)
	}
	return string(out)
}

// run runs a program as a unit and returns what it printed and its exit code.
func (w *world) run(host, unit string, argv ...string) (out string, code int) {
	w.t.Helper()
	return w.feed("", host, unit, argv...)
}

// feed is run with something to read for the program.
func (w *world) feed(stdin, host, unit string, argv ...string) (out string, code int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var both bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &both, &both
	if err := w.Start(host, unit, cmd); err != nil {
		w.t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("%v: %v", argv, err)
	}
	if ctx.Err() != nil {
		w.t.Fatalf("%v did not end: %s", argv, &both)
	}
	return both.String(), cmd.ProcessState.ExitCode()
}

// curl gets a URL; the last line of out is the status code, 000 for none.
func (w *world) curl(host, unit string, args ...string) (out string, code int) {
	w.t.Helper()
	return w.run(host, unit, append([]string{"curl", "-sS", "-g", "--max-time", "8", "-w", `\n%{http_code}`}, args...)...)
}

// program finds a program or skips the test, or fails it where nothing may be skipped.
func program(t *testing.T, names ...string) (paths []string) {
	t.Helper()
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
				if p, e := exec.LookPath(filepath.Join(dir, name)); e == nil {
					path, err = p, nil
				}
			}
		}
		if err != nil && os.Getenv(nettest.RootTestsEnv) == "1" {
			t.Fatalf("%s is not installed", name)
		}
		if err != nil {
			t.Skipf("%s is not installed", name)
		}
		paths = append(paths, path)
	}
	return paths
}

// policies writes a policy file and returns its directory.
func policies(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "test.cedar"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}
