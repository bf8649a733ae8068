package faults_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/test/nettest"
	"ringfence.dev/tools/ringfence/lab"
)

// basePolicy: the shop and the trusted program may dial whom they like, anybody
// may dial the service named open, and that is all.
const basePolicy = `@id("shop-dials")
permit (principal == Workload::"spiffe://faults.test/ns/a/sa/shop", action == Action::"connect", resource);
@id("open-is-dialled")
permit (principal, action == Action::"connect", resource == Service::"spiffe://faults.test/ns/a/sa/open");
@id("trusted-dials")
permit (principal == Workload::"spiffe://faults.test/ns/a/sa/trusted", action == Action::"connect", resource);
`

// settings are an agent's settings file before it is written.
type settings map[string]any

// scopes as they stand in the settings file.
type scopeSettings = map[string]any

// agentProc is an agent in a process of its own.
type agentProc struct {
	*lab.Agent
	t        testing.TB
	instance string
	policies string
	ns       *nettest.NS // where it runs; nil for here
	client   *admin.Client
}

var agents atomic.Uint32

// newAgent starts an agent for one test. over replaces settings.
func newAgent(t testing.TB, over settings) *agentProc { t.Helper(); return newAgentIn(t, nil, over) }

// newAgentIn starts an agent whose host is a network namespace.
func newAgentIn(t testing.TB, ns *nettest.NS, over settings) *agentProc {
	t.Helper()
	a := prepareAgent(t, strconv.Itoa(int(agents.Add(1))), over)
	a.ns = ns
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the log of agent %s:\n%s", a.instance, a.Tail(25))
		}
		if err := a.remove(); err != nil {
			t.Error(err)
		}
	})
	if err := a.start(); err != nil {
		t.Fatal(err)
	}
	return a
}

// prepareAgent writes an agent's settings and policies. Nothing is started.
func prepareAgent(t testing.TB, name string, over settings) *agentProc {
	t.Helper()
	dir := filepath.Join(scratch, name)
	a := &agentProc{t: t, instance: fmt.Sprintf("rff%d-%s", os.Getpid(), name), policies: filepath.Join(dir, "policies")}
	if err := os.MkdirAll(a.policies, 0o700); err != nil {
		t.Fatal(err)
	}
	a.writePolicy(basePolicy)
	s := settings{
		"instance": a.instance, "trust_domain": "faults.test", "host": "a",
		"state_dir": filepath.Join(dir, "state"), "policies": a.policies,
		"unit_roots": []string{unitRoot}, "scopes": []scopeSettings{},
		"admin":   settings{"socket": filepath.Join(dir, "sock")},
		"metrics": settings{"listen": "off"}, "readiness": settings{"listen": "off"},
		"decision_log":  settings{"path": "off"},
		"drain_timeout": "1s",
	}
	for k, v := range over {
		s[k] = v
	}
	text, err := yaml.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "agent.yaml"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	socket := s["admin"].(settings)["socket"].(string)
	a.Agent = &lab.Agent{Binary: binary, Dir: dir, Socket: socket}
	a.client = admin.NewClient(socket)
	return a
}

// in gives the agent to another test.
func (a *agentProc) in(t testing.TB) *agentProc {
	b := *a
	b.t = t
	return &b
}

func (a *agentProc) start() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if a.ns == nil {
		return a.Start(ctx)
	}
	return a.ns.Do(func() error { return a.Start(ctx) })
}

// remove stops the agent and takes away what it left, in its own namespace.
func (a *agentProc) remove() error {
	do := func(fn func() error) error { return fn() }
	if a.ns != nil {
		do = a.ns.Do
	}
	return do(func() error { return a.Remove(context.Background()) })
}

func (a *agentProc) writePolicy(text string) {
	a.t.Helper()
	// Renamed into place, so that the agent never reads half of it.
	tmp := filepath.Join(a.policies, ".new")
	err := os.WriteFile(tmp, []byte(text), 0o600)
	if err = errors.Join(err, os.Rename(tmp, filepath.Join(a.policies, "test.cedar"))); err != nil {
		a.t.Fatal(err)
	}
}

// status asks the agent, and fails the test when it does not answer.
func (a *agentProc) status() (s admin.Status) {
	a.t.Helper()
	if err := a.client.Get(context.Background(), "/v1/status", nil, &s); err != nil {
		a.t.Fatal(err)
	}
	return s
}

// scope is the status of one scope.
func (a *agentProc) scope(name string) admin.Scope {
	a.t.Helper()
	for _, sc := range a.status().Scopes {
		if sc.Name == name {
			return sc
		}
	}
	a.t.Fatalf("no scope %s", name)
	return admin.Scope{}
}

// decisions of a scope, newest first.
func (a *agentProc) decisions(scope string) (all []decisionlog.Record) {
	a.t.Helper()
	q := url.Values{"scope": {scope}, "limit": {"1000"}}
	if err := a.client.Get(context.Background(), "/v1/decisions", q, &all); err != nil {
		a.t.Fatal(err)
	}
	return all
}

// decided waits for a decision that matches.
func (a *agentProc) decided(scope, what string, match func(decisionlog.Record) bool) (r decisionlog.Record) {
	a.t.Helper()
	nettest.Wait(a.t, what, func() bool {
		for _, r = range a.decisions(scope) {
			if match(r) {
				return true
			}
		}
		return false
	})
	return r
}

// signal sends the agent a signal; after SIGKILL it waits for the end.
func (a *agentProc) signal(sig unix.Signal) {
	a.t.Helper()
	pid := a.PID()
	if pid == 0 {
		a.t.Fatal("the agent does not run")
	}
	if err := unix.Kill(pid, sig); err != nil {
		a.t.Fatal(err)
	}
	if sig == unix.SIGKILL {
		nettest.Wait(a.t, "the agent to be gone", func() bool { return a.PID() == 0 })
	}
}

// restart starts the next agent after the end of the last one.
func (a *agentProc) restart() {
	a.t.Helper()
	if err := a.Stop(context.Background()); err != nil { // reaps it
		a.t.Fatal(err)
	}
	if err := a.start(); err != nil {
		a.t.Fatal(err)
	}
}

// commandLimit ends a command that ought to end by itself.
const commandLimit = 30 * time.Second

// command runs the command under test and returns what it printed, and its exit code.
func (a *agentProc) command(args ...string) (out string, code int) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, append([]string{"--socket", a.Socket}, args...)...)
	var both bytes.Buffer
	cmd.Stdout, cmd.Stderr = &both, &both
	run := cmd.Run
	if a.ns != nil {
		run = func() error { return a.ns.Do(cmd.Run) }
	}
	var exit *exec.ExitError
	if err := run(); err != nil && !errors.As(err, &exit) {
		a.t.Fatal(err)
	}
	return both.String(), cmd.ProcessState.ExitCode()
}

// must is command for what has to succeed.
func (a *agentProc) must(args ...string) string {
	a.t.Helper()
	out, code := a.command(args...)
	if code != 0 {
		a.t.Fatalf("ringfence %v: exit code %d: %s", args, code, out)
	}
	return out
}
