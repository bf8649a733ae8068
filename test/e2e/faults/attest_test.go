package faults_test

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/policy/decisionlog"
	"ringfence.dev/test/nettest"
)

// program is one of two copies of the workload: "trusted", which has an entry by
// its path, and "impostor".
func program(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(scratch, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func trustedEntries() []settings {
	return []settings{{
		"id":        "spiffe://faults.test/ns/a/sa/trusted",
		"selectors": []string{"unix:path:" + filepath.Join(scratch, "trusted")},
	}}
}

// dialled is a connection that waits for an agent which is stopped: its process
// has done what it had to do before anybody could look at it.
func (w *site) dialled(a *agentProc, start func() *proc) (pid int) {
	w.t.Helper()
	resume := func() { // also when the test fails in between
		if pid := a.PID(); pid != 0 {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	}
	w.t.Cleanup(resume)
	for range 20 {
		a.in(w.t).signal(unix.SIGSTOP)
		p := start()
		r := p.next()
		if r.Step == "" {
			return r.PID
		}
		// Too slow: the agent counted as hung before the dial. Once more.
		p.end()
		resume()
		nettest.Wait(w.t, "the agent to be back", func() bool { return w.run("shop", job{To: "192.0.2.2:80"}).Got == "app" })
	}
	w.t.Fatal("no dial was in time")
	return 0
}

// settled lets the agent go on and waits until it has dealt with all that was
// waiting: connections are accepted in order, and the shop's comes last.
func (w *site) settled(a *agentProc, far *far) (others []string) {
	w.t.Helper()
	a.in(w.t).signal(unix.SIGCONT)
	nettest.Wait(w.t, "the agent to serve again", func() bool { return w.run("shop", job{To: "192.0.2.2:81"}).Got == "app" })
	return far.clients()
}

// A process that is gone when its connection is looked at is nobody: neither its
// name nor that of whoever has its number by then may open anything.
func TestExitBeforeAttestation(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		w := newSite(t).in(a, "enforce")
		far := w.listen("192.0.2.2:80")
		w.listen("192.0.2.2:81")
		for _, recycled := range []bool{false, true} {
			name := "gone"
			if recycled {
				name = "recycled"
			}
			t.Run(name, func(t *testing.T) {
				w := w.on(t)
				var thief *proc
				pid := w.dialled(a, func() *proc {
					thief = launch(t, w.host, "thief", job{To: "192.0.2.2:80", Send: "stolen", Leave: true})
					return thief
				})
				_ = thief.cmd.Wait()
				far.clients()
				if recycled {
					defer respawn(t, w, pid).end()
				}
				if c := w.settled(a, far); len(c) != 0 {
					t.Errorf("a connection of a process that had ended reached the server: %v", c)
				}
				for _, d := range a.decisions(w.name) {
					if d.PID == uint32(pid) && d.Effect.String() == "permit" {
						t.Errorf("permitted: %+v", d)
					}
				}
			})
		}
	})
}

// respawn starts processes of the shop until one has the number. Other programs
// of the machine take numbers too, hence the loop.
func respawn(t *testing.T, w *site, pid int) *proc {
	t.Helper()
	for range 300 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Fatal(err)
		}
		p := launch(t, w.host, "shop", job{To: "192.0.2.2:81", Pause: true})
		if p.cmd.Process.Pid == pid {
			p.next()
			return p
		}
		p.end()
	}
	t.Fatalf("the number %d could not be had again", pid)
	return nil
}

// Who connects and then becomes another program has not connected as that program.
func TestExecAfterConnect(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		w := newSite(t).in(a, "enforce")
		far := w.listen("192.0.2.2:80")
		w.listen("192.0.2.2:81")
		trusted, impostor := program(t, "trusted"), program(t, "impostor")
		const after = `{"Given":true,"How":"none"}`
		plain := launchAs(t, w.host, unitDir(t, "tool"), trusted, job{To: "192.0.2.2:80"})
		if r := plain.next(); r.Got != "app" {
			t.Fatalf("the trusted program itself: %v", r)
		}
		for name, c := range map[string]struct{ first, then string }{
			"impostor becomes trusted": {impostor, trusted},
			"trusted becomes impostor": {trusted, impostor},
		} {
			t.Run(name, func(t *testing.T) {
				w := w.on(t)
				far.clients()
				p := launchAs(t, w.host, unitDir(t, "tool"), c.first,
					job{To: "192.0.2.2:80", Send: "x", Pause: true, Exec: []string{c.then, after}})
				if r := p.next(); r.Step != "" {
					t.Fatal(r)
				}
				a.in(t).signal(unix.SIGSTOP)
				t.Cleanup(func() { _ = unix.Kill(a.PID(), unix.SIGCONT) })
				if _, err := io.WriteString(p.in, "\n"); err != nil {
					t.Fatal(err)
				}
				nettest.Wait(t, "the process to have become "+c.then, func() bool {
					exe, _ := os.Readlink("/proc/" + strconv.Itoa(p.cmd.Process.Pid) + "/exe")
					return exe == c.then || p.ended()
				})
				reached := w.settled(a, far)
				if capture == "iptables" && c.then == trusted {
					return // evidence after the fact cannot tell; doctor says so, see TestDoctorNamesWhatIsOpen
				}
				if c.then == impostor {
					// It connected as the trusted one. If the agent was quick to look, before it was
					// stopped, that is who was let in; what it became later is never asked for.
					for _, d := range a.in(t).decisions(w.name) {
						as := d.PID == uint32(p.cmd.Process.Pid) && filepath.Base(d.Principal) == "impostor"
						if as && (capture == "ebpf" || d.Effect.String() == "permit") {
							t.Errorf("taken for what it became: %+v", d)
						}
					}
					return
				}
				if len(reached) != 0 {
					t.Errorf("the server was reached: %v", reached)
				}
				if r := p.next(); r.Got != "" {
					t.Errorf("the connection was served: %v", r)
				}
				a.in(t).noneFor(w.name, "trusted", p.cmd.Process.Pid)
			})
		}
	})
}

// noneFor fails if the process was permitted anything under the name.
func (a *agentProc) noneFor(scope, name string, pid int) {
	a.t.Helper()
	permitted := func(d decisionlog.Record) bool {
		return d.PID == uint32(pid) && d.Effect.String() == "permit" && filepath.Base(d.Principal) == name
	}
	for _, d := range a.decisions(scope) {
		if permitted(d) {
			a.t.Errorf("permitted as %s: %+v", name, d)
		}
	}
}
