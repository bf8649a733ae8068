package iptables

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"ringfence.dev/agent/capture"
	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

// startGuard runs a real guard process.
func startGuard(t *testing.T) *Guard {
	t.Helper()
	nettest.RequireRoot(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(helperEnv, "1")
	t.Setenv("GORACE", "atexit_sleep_ms=0")
	g, err := StartGuard(exe, "guard")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// kill does to the guard what the agent's death does: the connection ends.
// It returns when the guard has done its work and is gone.
func (g *Guard) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.done = true
	g.dropLocked()
}

func TestGuardWritesTheWillOfADeadAgent(t *testing.T) {
	for _, c := range []struct {
		name          string
		mode          authz.Mode
		down          capture.OnAgentDown
		out, in, rule string
	}{
		{"enforce", authz.Enforce, capture.DownClosed, "refused", "refused", "RINGFENCE_BLK"},
		{"enforce-open", authz.Enforce, capture.DownOpen, "peer", "workload 192.0.2.1:9090", ""},
		{"dry-run", authz.DryRun, capture.DownClosed, "peer", "workload 192.0.2.1:9090", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := startGuard(t)
			h := newHost(t, "", g)
			h.scope.OnAgentDown = c.down
			serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
			serveBanner(t, h.peer, "[2001:db8::2]:8080", "peer")
			serveWorkload(t, h.ns, cg.work, "192.0.2.1:9090")
			h.add(c.mode)
			h.want(cg.work, "outbound 192.0.2.2:8080", "192.0.2.2:8080")
			h.die()
			g.kill()
			h.want(cg.work, c.out, "192.0.2.2:8080")
			h.want(cg.work, c.out, "[2001:db8::2]:8080")
			h.wantPeer(c.in, "192.0.2.1:9090")
			variant, _ := h.b.scopes["test"].fw.Variant()
			if text := h.saved(variant); c.rule == "" && strings.Contains(text, "RINGFENCE") || !strings.Contains(text, c.rule) {
				t.Errorf("rules after the agent's end:\n%s", text)
			}
		})
	}
}

// pipeGuard runs the guard's loop in this process, with a limit short enough to wait for.
func pipeGuard(t *testing.T, limit time.Duration) *Guard {
	t.Helper()
	nettest.RequireRoot(t)
	g := &Guard{start: func() (net.Conn, func(), error) {
		ours, file, err := socketpair()
		if err != nil {
			return nil, nil, err
		}
		defer file.Close()
		theirs, err := net.FileConn(file)
		if err != nil {
			return nil, nil, err
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = runGuard(context.Background(), theirs, slog.New(slog.DiscardHandler), limit)
		}()
		return ours, func() { ours.Close(); <-done }, nil
	}}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.connectLocked(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// A stopped agent's listeners still take connections; after the limit nobody
// is led to them any more, and when it goes on, everything is as before.
func TestGuardNoticesAStoppedAgent(t *testing.T) {
	g := pipeGuard(t, 300*time.Millisecond)
	h := newHost(t, "", g)
	serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
	h.add(authz.Enforce)
	sc := h.b.scopes["test"]
	variant, _ := sc.fw.Variant()
	// Nobody beats: this is the stopped agent.
	nettest.Wait(t, "the guard to act", func() bool { return !strings.Contains(h.saved(variant), "RINGFENCE_TO") })
	h.want(cg.work, "refused", "192.0.2.2:8080")

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.b.Run(ctx, func(capture.Event) {}) }()
	nettest.Wait(t, "the agent to write its rules again", func() bool { return strings.Contains(h.saved(variant), "RINGFENCE_TO") })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A guard that dies is replaced, and knows of every scope again.
func TestGuardIsReplaced(t *testing.T) {
	g := pipeGuard(t, GuardLimit)
	h := newHost(t, "", g)
	h.add(authz.DryRun)
	serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
	g.mu.Lock()
	g.conn.Close() // the process is gone; its will was written
	g.mu.Unlock()
	variant, _ := h.b.scopes["test"].fw.Variant()
	nettest.Wait(t, "the guard to act", func() bool { return !strings.Contains(h.saved(variant), "RINGFENCE") })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.b.Run(ctx, func(capture.Event) {}) }()
	nettest.Wait(t, "rules to be back", func() bool { return strings.Contains(h.saved(variant), "RINGFENCE_TO") })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	h.die()
	g.kill()
	h.want(cg.work, "peer", "192.0.2.2:8080")
}

// The service manager removes the agent's cgroup with the agent, maybe before the
// guard has written a rule that names it.
func TestGuardCopesWithoutTheAgentsCgroup(t *testing.T) {
	g := pipeGuard(t, GuardLimit)
	h := newHost(t, "", g)
	leaf := cg.base + "/gone"
	if err := os.Mkdir(cg.root+leaf, 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	if h.b, err = New(t.Context(), Config{Leaf: leaf, Guard: g}); err != nil {
		t.Fatal(err)
	}
	h.add(authz.Enforce)
	if err := os.Remove(cg.root + leaf); err != nil {
		t.Fatal(err)
	}
	if wrong := h.b.Verify("test"); len(wrong) != 1 || !strings.Contains(wrong[0], "loop guard") {
		t.Errorf("Verify = %q", wrong)
	}
	h.die()
	g.kill()
	variant, _ := h.b.scopes["test"].fw.Variant()
	if text := h.saved(variant); !strings.Contains(text, "RINGFENCE_BLK") || strings.Contains(text, "RINGFENCE_TO") {
		t.Errorf("rules after the agent's end:\n%s", text)
	}
	h.want(cg.work, "refused", "192.0.2.2:8080")
}

func TestGuardRefusesNonsense(t *testing.T) {
	nettest.RequireRoot(t)
	ours, file, err := socketpair()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	theirs, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- runGuard(ctx, theirs, slog.New(slog.DiscardHandler), time.Minute) }()
	in := &lines{conn: ours}
	for _, text := range []string{"nonsense", `{"op":"shoot"}`, `{"op":"arm"}`, `{"op":"arm","will":{"scope":"x","netns":"/proc/self/ns/mnt"}}`} {
		if _, err := ours.Write([]byte(text + "\n")); err != nil {
			t.Fatal(err)
		}
		if line, err := in.next(); err != nil || !strings.Contains(string(line), "error") {
			t.Errorf("answer to %s: %s, %v", text, line, err)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("runGuard = %v", err)
	}
	ours.Close()
}
