package lab

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent"
	"ringfence.dev/ca"
	"ringfence.dev/test/nettest"
)

func TestUpWithAgents(t *testing.T) {
	l := testLab(t, Options{})
	for _, s := range l.Status(t.Context()) {
		if s.Agent != "ready" || s.PID == 0 || s.Mode != "enforce" || s.Capture != "auto" {
			t.Errorf("%+v", s)
		}
	}
	st, err := os.Stat(l.Dir())
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("state directory: %v %v", st.Mode(), err)
	}
	var out bytes.Buffer
	if err := l.Logs(&out); err != nil || !strings.Contains(out.String(), "a: agent a is ready\n") || !strings.Contains(out.String(), "b: agent b") {
		t.Errorf("logs (%v): %s", err, &out)
	}
	policy, err := os.ReadFile(l.path("policies", "permit-everything.cedar"))
	if err != nil || !bytes.Contains(policy, []byte("permit (principal, action, resource);")) {
		t.Errorf("default policy: %q %v", policy, err)
	}
}

func TestOneAgentOnly(t *testing.T) {
	l := testLab(t, Options{Agents: []string{"b"}, Mode: "dry-run", Capture: "ebpf"})
	s := l.Status(t.Context())
	if s[0].Agent != "none" || s[1].Agent != "ready" || s[1].Mode != "dry-run" {
		t.Errorf("%+v", s)
	}
	if err := l.Restart(t.Context(), "a"); err == nil {
		t.Error("a host without an agent was restarted")
	}
}

func TestAgentsComeAndGo(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	nap := exec.Command("sleep", "100")
	if err := l.Start("a", "nap", nap); err != nil {
		t.Fatal(err)
	}
	if _, err := Up(t.Context(), Options{Name: l.opts.Name, Capture: "iptables"}); err != nil {
		t.Fatal(err)
	}
	l, err := Open(l.opts.Name)
	if err != nil {
		t.Fatal(err)
	}
	if s := l.Status(t.Context()); s[0].Agent != "ready" || s[1].Capture != "iptables" || len(s[0].Units) != 1 {
		t.Errorf("%+v", s)
	}
	if err := l.Unprotect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := l.Status(t.Context()); s[0].Agent != "none" || len(s[0].Units) != 1 {
		t.Errorf("%+v", s)
	}
	if pins, _ := filepath.Glob(pinOf(l.opts.Name + "-*")); len(pins) > 0 {
		t.Errorf("left in the kernel: %v", pins)
	}
	if err := Down(t.Context(), l.opts.Name, ""); err != nil {
		t.Error(err)
	}
	nap.Wait()
}

func TestUpQuotesTheLogOfAFailedAgent(t *testing.T) {
	nettest.RequireRoot(t)
	fault(t, "b", "dies")
	name := testName(t)
	_, err := Up(t.Context(), Options{Name: name})
	if err == nil || !strings.Contains(err.Error(), "no such capability") || !strings.Contains(err.Error(), "host b") {
		t.Errorf("up with a dying agent: %v", err)
	}
	wantNothing(t, name)
}

func TestUpStopsWhenAsked(t *testing.T) {
	nettest.RequireRoot(t)
	fault(t, "a", "never ready")
	name := testName(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		nettest.Wait(t, "the agent to run", func() bool {
			log, _ := os.ReadFile(filepath.Join(runDir, name, "a", "agent.log"))
			return bytes.Contains(log, []byte("still waiting"))
		})
	}()
	_, err := Up(ctx, Options{Name: name})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("up that was interrupted: %v", err)
	}
	wantNothing(t, name)
}

func TestFailedAgentsLeaveBareHosts(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	fault(t, "a", "dies")
	if err := l.Protect(t.Context(), Options{}); err == nil {
		t.Fatal("protect with a dying agent succeeded")
	}
	if s := l.Status(t.Context()); s[0].Agent != "none" || s[1].Agent != "none" || s[1].Capture != "off" {
		t.Errorf("%+v", s)
	}
}

func TestRestart(t *testing.T) {
	l := testLab(t, Options{})
	before := l.Status(t.Context())
	if out, code := run(t, l, "restart", "a"); code != 0 {
		t.Fatal(out)
	}
	after := l.Status(t.Context())
	if after[0].Agent != "ready" || after[0].PID == before[0].PID || after[1].PID != before[1].PID {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

func TestDownAfterACrash(t *testing.T) {
	for _, how := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
		l := testLab(t, Options{})
		a, _ := l.Agent("a")
		if err := unix.Kill(a.PID(), how); err != nil {
			t.Fatal(err)
		}
		// As from another process, which knows nothing but what is on disk.
		if err := Down(t.Context(), l.opts.Name, ""); err != nil {
			t.Error(how, err)
		}
		a.child.Wait()
		b, _ := l.Agent("b")
		b.child.Wait()
		wantNothing(t, l.opts.Name)
	}
}

func TestDeafAgentIsKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as an agent may take to stop")
	}
	l := testLab(t, Options{Agents: []string{"a"}})
	fault(t, "a", "deaf")
	if err := l.Restart(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	a, _ := l.Agent("a")
	if err := a.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if a.PID() != 0 {
		t.Error("agent survived")
	}
}

// A pid file may outlive its process, and the pid go to somebody else.
func TestRecycledPIDIsLeftAlone(t *testing.T) {
	other := exec.Command("sleep", "100")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { other.Process.Kill(); other.Wait() }()
	p, err := inspect(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	stale := process{PID: p.PID, Start: p.Start - 1}
	a := &Agent{Dir: t.TempDir()}
	if err := stale.writePIDFile(a.file("pid")); err != nil {
		t.Fatal(err)
	}
	if a.PID() != 0 {
		t.Error("another process is taken for the agent")
	}
	if err := a.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if !p.alive() {
		t.Error("a process that was not the agent was ended")
	}
}

func TestMalformedPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.pid")
	for _, text := range []string{"", "x", "12", "1 5", "-4 5", "0 0"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readPIDFile(path); err == nil || errors.Is(err, errGone) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestAgentsShareOneRoot(t *testing.T) {
	l := testLab(t, Options{TrustDomain: "shared.test"})
	var bundles []*spiffebundle.Bundle
	for _, h := range []string{"a", "b"} {
		dir := l.path(h, "state", "ca")
		if _, err := os.Stat(filepath.Join(dir, "root.pem")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("host %s holds the root key (%v)", h, err)
		}
		bundle, err := ca.Bundle(dir)
		if err != nil {
			t.Fatal(err)
		}
		bundles = append(bundles, bundle)
	}
	if len(bundles[0].X509Authorities()) != 1 || !bundles[0].Equal(bundles[1]) {
		t.Error("the hosts trust different roots")
	}
}

// What the lab writes is what the agent reads: every key known, every value sound.
func TestSettingsAreTheAgents(t *testing.T) {
	l := &Lab{opts: Options{Name: "x", TrustDomain: "lab.test", Capture: "auto", Mode: "enforce"}}
	c := l.agentConfig("a", "/run/policies")
	c.Scopes = append(c.Scopes, Scope{Name: "host", Host: true, Cgroups: []string{"/rf-x/here/*"}, Mode: "watch", Loopback: "observe"})
	data, err := yaml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	read, err := agent.ParseConfig(data)
	if err != nil {
		t.Fatalf("%v in\n%s", err, data)
	}
	s, err := read.Check()
	if err != nil {
		t.Fatalf("%v in\n%s", err, data)
	}
	if s.Instance != "x-a" || s.Host != "a" || s.AdminSocket != l.Socket("a") || len(s.Scopes) != 2 || s.Scopes[0].Path != l.NetNS("a") {
		t.Errorf("%+v", s)
	}
}
