package faults_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"ringfence.dev/test/e2e/world"
	"ringfence.dev/test/nettest"
)

var (
	// binary is the command under test: built once, with the race detector when the tests have it,
	// unless the environment names one.
	binary string
	// scratch is a directory with a short path: a unix socket's may have 107 bytes.
	scratch string
	// unitRoot is the cgroup path below which workloads are units.
	unitRoot = fmt.Sprintf("/rf-faults-%d", os.Getpid())
)

func TestMain(m *testing.M) {
	if text, ok := os.LookupEnv(jobEnv); ok {
		runJob(text)
		return
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // each test skips, or fails, by itself
	}
	var err error
	if scratch, err = os.MkdirTemp("", "rff"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	// Agents write what the race detector finds where it is looked for at the end,
	// and do not linger for a second when they end.
	os.Setenv("GORACE", "atexit_sleep_ms=0 log_path="+filepath.Join(scratch, "race"))
	if binary = os.Getenv(world.BinaryEnv); binary == "" {
		binary = filepath.Join(scratch, "ringfence")
		if err := build(binary, raced); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	code := m.Run()
	stopShared()
	removeUnits()
	if races, _ := filepath.Glob(filepath.Join(scratch, "race.*")); len(races) > 0 {
		report, _ := os.ReadFile(races[0])
		fmt.Fprintf(os.Stderr, "the race detector spoke in %d agents; the first says:\n%s\n", len(races), report)
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(goleak.IgnoreAnyFunction("ringfence.dev/cni/netns.(*openerThread).start.func1")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

func build(to string, race bool) error {
	args := []string{"build", "-trimpath", "-o", to}
	cgo := "0"
	if race {
		args, cgo = append(args, "-race"), "1"
	}
	cmd := exec.Command("go", append(args, "ringfence.dev/tools/ringfence")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the command: %w\n%s", err, out)
	}
	return nil
}

// forEachCapture runs a test in each mode of capture.
func forEachCapture(t *testing.T, test func(t *testing.T, capture string)) {
	nettest.RequireRoot(t)
	for _, capture := range []string{"ebpf", "iptables"} {
		t.Run(capture, func(t *testing.T) { test(t, capture) })
	}
}

var shared struct {
	sync.Mutex
	agents map[string]*agentProc
}

// sharedAgent is one agent for all tests that only need some agent: scopes come
// and go in it at run time. Its policies are [basePolicy].
func sharedAgent(t *testing.T, capture string) *agentProc {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if a := shared.agents[capture]; a != nil {
		return a.in(t)
	}
	a := prepareAgent(t, "shared-"+capture, settings{"capture": capture, "entries": trustedEntries()})
	if err := a.start(); err != nil {
		_ = a.remove()
		t.Fatal(err)
	}
	if shared.agents == nil {
		shared.agents = map[string]*agentProc{}
	}
	shared.agents[capture] = a
	return a
}

func stopShared() {
	shared.Lock()
	defer shared.Unlock()
	for capture, a := range shared.agents {
		if err := a.remove(); err != nil {
			fmt.Fprintf(os.Stderr, "shared %s agent: %v\n", capture, err)
		}
	}
}
