package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.yaml.in/yaml/v3"
)

// TestMain lets the test binary stand in for the ringfence command: the lab
// starts it as "agent", and tests start it as "lab".
func TestMain(m *testing.M) {
	// A race-detecting program waits a second before it ends, unless told not to.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		os.Exit(fakeAgent(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "lab" {
		cmd := Command()
		cmd.SetArgs(os.Args[2:])
		cmd.SilenceUsage = true
		if err := cmd.ExecuteContext(context.Background()); err != nil {
			if e, ok := err.(*ExitError); ok {
				os.Exit(e.Code)
			}
			os.Exit(1)
		}
		os.Exit(0)
	}
	// The thread that opens sockets for cni/netns lives as long as the process.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("ringfence.dev/cni/netns.(*openerThread).start.func1"))
}

// fakeAgent keeps the part of the agent's contract that the lab relies on: it
// is strict about its settings, serves /readyz on its admin socket, ends on
// SIGTERM, and leaves a pin behind that only --cleanup removes. What it does
// wrong, when told to by a file, is what the lab must cope with.
func fakeAgent(args []string) int {
	cleanup := args[0] == "--cleanup"
	if cleanup {
		args = args[1:]
	}
	if len(args) != 2 || args[0] != "--config" {
		fmt.Println("usage:", args)
		return 2
	}
	f, err := os.Open(args[1])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	var c AgentConfig
	dec := yaml.NewDecoder(f)
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil {
		fmt.Println(err)
		return 1
	}
	pin := pinOf(c.Instance)
	if cleanup {
		os.Remove(pin)
		return 0
	}
	fault, _ := os.ReadFile(filepath.Join(filepath.Dir(pin), "fault-"+c.Host))
	os.WriteFile(pin, nil, 0o600)
	os.Remove(c.Admin.Socket)
	l, err := net.Listen("unix", c.Admin.Socket)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	switch strings.TrimSpace(string(fault)) {
	case "dies":
		fmt.Println("first line\nno such capability")
		return 3
	case "never ready":
		fmt.Println("still waiting")
		return serveReady(l, http.StatusServiceUnavailable)
	case "deaf":
		signal.Ignore(syscall.SIGTERM)
		go http.Serve(l, nil)
		return serveReady(l, http.StatusOK)
	}
	fmt.Println("agent", c.Host, "is ready")
	return serveReady(l, http.StatusOK)
}

func serveReady(l net.Listener, status int) int {
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		fmt.Fprint(w, "status of ", r.URL.Path)
	}))
	end := make(chan os.Signal, 1)
	if !signal.Ignored(syscall.SIGTERM) {
		signal.Notify(end, syscall.SIGTERM)
	}
	select {
	case <-end:
	case <-time.After(2 * time.Minute): // orphaned by a test that was killed
	}
	return 0
}

// pinOf is the file that stands for what an agent leaves in the kernel.
func pinOf(instance string) string {
	return filepath.Join(os.TempDir(), "ringfence-lab-test", instance)
}
