package world

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

// built is where the commands under test are built, made by Main.
var built string

// Main runs the tests of a package, or plays the puppet that a test started.
func Main(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == puppetArg {
		os.Exit(play())
	}
	// A race-detecting program waits a second before it ends, unless told not to.
	// A race that an agent sees must not pass unnoticed.
	os.Setenv("GORACE", "atexit_sleep_ms=0 halt_on_error=1")
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if built, err = os.MkdirTemp("", "ringfence-e2e-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(built)
	code := m.Run()
	// The thread that opens sockets for cni/netns lives as long as the process.
	if err := goleak.Find(goleak.IgnoreTopFunction("ringfence.dev/cni/netns.(*openerThread).start.func1")); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// command builds one form of the command, once.
type command struct {
	once sync.Once
	path string
	err  error
}

var release, racing command

// Release is the command as it is shipped.
func Release(t testing.TB) string {
	t.Helper()
	return release.get(t, "ringfence", "0", "-trimpath")
}

// Binary is the command with the race detector, or as it is shipped where the
// detector cannot be built in (it needs cgo and a C compiler).
func Binary(t testing.TB) string {
	t.Helper()
	if !canRace() {
		return Release(t)
	}
	return racing.get(t, "ringfence-race", "1", "-race")
}

func canRace() bool {
	_, err := exec.LookPath("gcc")
	return err == nil && (runtime.GOARCH == "amd64" || runtime.GOARCH == "arm64")
}

// BinaryEnv names, if set, a ready command to test in place of one built here,
// such as one from a package.
const BinaryEnv = "RINGFENCE_TEST_BINARY"

func (c *command) get(t testing.TB, name, cgo string, flags ...string) string {
	t.Helper()
	if ready := os.Getenv(BinaryEnv); ready != "" {
		return ready
	}
	c.once.Do(func() {
		c.path = filepath.Join(built, name)
		args := append(append([]string{"build"}, flags...), "-o", c.path, "ringfence.dev/tools/ringfence")
		cmd := exec.Command("go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			c.err = fmt.Errorf("build the command: %w\n%s", err, out)
		}
	})
	if c.err != nil {
		t.Fatal(c.err)
	}
	return c.path
}
