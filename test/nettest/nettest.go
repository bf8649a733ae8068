// Package nettest makes the scratch things that tests of the kernel's side need:
// network namespaces, veth pairs, cgroups, and a wait with a deadline. All of it
// is undone by the test's cleanup, and carries the process id in its name, so
// that test binaries running side by side do not meet.
//
// It imports no other package of the module, so that any of them may use it in
// tests of its own internals.
package nettest

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// RootTestsEnv is the environment variable that, set to 1, turns the skip of a
// root test into a failure. The full test run sets it, so that nothing is left
// out in silence.
const RootTestsEnv = "RINGFENCE_ROOT_TESTS"

// waitLimit is generous because a loaded machine is slow, not wrong; pollEvery
// is short because most conditions hold within a scheduler tick.
const (
	waitLimit = 15 * time.Second
	pollEvery = 2 * time.Millisecond
)

var serial atomic.Uint32

// RequireRoot skips the test when it does not run as root, or fails it when the
// environment says that root tests must run.
func RequireRoot(t testing.TB) {
	t.Helper()
	requireRoot(t, os.Geteuid())
}

func requireRoot(t testing.TB, euid int) {
	t.Helper()
	if euid == 0 {
		return
	}
	if os.Getenv(RootTestsEnv) == "1" {
		t.Fatalf("needs root, and %s=1 forbids skipping", RootTestsEnv)
	}
	t.Skip("needs root")
}

// Wait polls cond until it holds. It fails the test, saying what it waited for,
// when that takes more than 15 seconds.
func Wait(t testing.TB, what string, cond func() bool) {
	t.Helper()
	WaitFor(t, waitLimit, what, cond)
}

// WaitFor is Wait with a limit of its own.
func WaitFor(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	if !poll(limit, cond) {
		t.Fatalf("waited %v for %s", limit, what)
	}
}

// poll asks once more after the limit, so that a starved process does not fail a
// condition that came true in time.
func poll(limit time.Duration, cond func() bool) bool {
	if cond() {
		return true
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	end := time.NewTimer(limit)
	defer end.Stop()
	for {
		select {
		case <-tick.C:
			if cond() {
				return true
			}
		case <-end.C:
			return cond()
		}
	}
}

// unique makes a name that no other test on this machine uses at this time.
func unique(name string) string {
	return fmt.Sprintf("%s-%d-%d", name, os.Getpid(), serial.Add(1))
}

// Missing skips a test for want of a program, and fails it where everything is
// to be run: there the set-up installs what the tests need.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv(RootTestsEnv) == "1" {
		t.Fatalf("%s; %s=1 says that nothing is to be skipped", what, RootTestsEnv)
	}
	t.Skip(what)
}
