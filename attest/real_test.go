package attest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"ringfence.dev/attest/workload"
	"ringfence.dev/test/nettest"
)

func TestRealProcess(t *testing.T) {
	l := newLab(t)
	prog := l.program("shopper")
	a := l.attestor(nil)
	free, unit := l.ready("", prog, nil, "play:wait"), l.ready("web.service", prog, nil, "play:wait")
	for p, want := range map[*player]string{free: "shopper", unit: "web"} {
		x := a.ExplainPID(context.Background(), p.pid())
		if x.Err != nil || x.Identity.ID.Path() != "/ns/a/sa/"+want || x.Identity.Name != want || x.Exe != prog {
			t.Errorf("%s: %+v", want, x)
		}
	}
	if x := a.ExplainPID(context.Background(), unit.pid()); x.Unit != "web.service" || x.Cgroup != l.root+"/web.service" {
		t.Errorf("unit %q in %q", x.Unit, x.Cgroup)
	}
}

// Between connect and attestation the process becomes another program.
func TestExecveAfterEvidence(t *testing.T) {
	l := newLab(t)
	first, second := l.program("first"), l.program("second")
	a := l.attestor(nil)
	p := l.ready("", first, nil, "play:exec", second, "play:wait")
	ev, err := a.evidence(p.pid())
	if err != nil {
		t.Fatal(err)
	}
	before, err := a.Identify(context.Background(), ev)
	if err != nil || before.Name != "first" {
		t.Fatalf("%s (%v)", before.ID, err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if got := p.line(); got != "ready" {
		t.Fatal(got)
	}
	after, err := a.Identify(context.Background(), ev)
	if err != nil || after.Name != "second" {
		t.Errorf("weak evidence after execve: %s (%v)", after.ID, err)
	}
	// With exec ids the kernel tells that the evidence is of the first image.
	strict := l.attestor(func(c *Config) { c.ExecID = func(workload.Process) (uint64, error) { return 2, nil } })
	ev.ExecID, ev.Source = 1, workload.SourceHook
	if id, err := strict.Identify(context.Background(), ev); !errors.Is(err, workload.ErrGone) {
		t.Errorf("strong evidence after execve: %s (%v)", id.ID, err)
	}
}

func TestProcessThatEnded(t *testing.T) {
	l := newLab(t)
	a := l.attestor(nil)
	p := l.ready("web.service", l.program("shopper"), nil, "play:wait")
	ev, err := a.evidence(p.pid())
	if err != nil {
		t.Fatal(err)
	}
	p.stop()
	if id, err := a.Identify(context.Background(), ev); !errors.Is(err, workload.ErrGone) {
		t.Errorf("%s (%v), want ErrGone", id.ID, err)
	}
}

func TestDeletedExecutableKeepsItsName(t *testing.T) {
	l := newLab(t)
	prog := l.program("shopper")
	a := l.attestor(nil)
	p := l.ready("", prog, nil, "play:wait")
	if err := os.Remove(prog); err != nil { // as a package upgrade does
		t.Fatal(err)
	}
	l.program("shopper")
	x := a.ExplainPID(context.Background(), p.pid())
	if x.Err != nil || x.Identity.ID.Path() != "/ns/a/sa/shopper" {
		t.Errorf("after an upgrade: %+v", x)
	}
}

// Any user can make a mount namespace and lay one root-owned file over another.
// The path the kernel gives is then a lie, for the template and for unix:path.
func TestForgedPath(t *testing.T) {
	l := newLab(t)
	real, other := l.program("curl"), l.program("python")
	a := l.attestor(func(c *Config) {
		c.Entries = []Entry{{"spiffe://lab.test/curl-by-path", []string{"unix:path:" + real}}}
	})
	honest := l.ready("", real, nil, "play:wait")
	if x := a.ExplainPID(context.Background(), honest.pid()); x.Err != nil || x.Identity.ID.Path() != "/curl-by-path" {
		t.Errorf("the real one: %+v", x)
	}
	script := `mount --bind "$1" "$2" && exec "$2" play:wait`
	forged := l.ready("", "/usr/bin/unshare", nil, "-m", "/bin/sh", "-c", script, "sh", other, real)
	if link, err := os.Readlink(filepath.Join("/proc", itoa(forged.pid()), "exe")); err != nil || link != real {
		t.Fatalf("the forgery executes %s (%v)", link, err)
	}
	x := a.ExplainPID(context.Background(), forged.pid())
	if !errors.Is(x.Err, workload.ErrUnknown) || !strings.Contains(x.Distrust, "another file") {
		t.Errorf("forged path: %+v", x)
	}
	for _, s := range x.Selectors {
		if strings.HasPrefix(s.Value, "path:") {
			t.Errorf("selector %s", s)
		}
	}
}

// A fork storm of short-lived processes, identified while they come and go:
// each answer is either right or an error, never another process's name.
func TestForkStorm(t *testing.T) {
	l := newLab(t)
	a := l.attestor(nil)
	progs := map[string]string{"red": l.program("red"), "green": l.program("green")}
	var wg sync.WaitGroup
	for name, path := range progs {
		for range 2 {
			wg.Go(func() {
				for range 4 {
					p := l.start("", path, nil, "play:wait")
					ev, err := a.evidence(p.pid())
					if p.line() != "ready" {
						t.Error("not ready")
					}
					if err == nil {
						stopped := make(chan struct{})
						go func() { p.stop(); close(stopped) }()
						id, err := a.Identify(context.Background(), ev)
						if err == nil && id.Name != name {
							t.Errorf("%s taken for %s", name, id.Name)
						}
						if err != nil && !errors.Is(err, workload.ErrGone) && !errors.Is(err, workload.ErrUnknown) {
							t.Error(err)
						}
						<-stopped
					}
				}
			})
		}
	}
	wg.Wait()
}

func TestInitial(t *testing.T) {
	nettest.RequireRoot(t)
	a, err := New(Config{TrustDomain: testDomain})
	if err != nil {
		t.Fatal(err)
	}
	pid, cgroup := a.Initial()
	links := map[string]bool{"pid:[4026531836]": pid, "cgroup:[4026531835]": cgroup}
	for _, kind := range []string{"pid", "cgroup"} {
		link, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		if said, ok := links[link]; ok && !said {
			t.Errorf("%s is initial, said it is not", link)
		}
	}
}
