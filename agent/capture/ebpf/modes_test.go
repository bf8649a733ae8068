package ebpf_test

import (
	"context"
	"fmt"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/workload"
	"ringfence.dev/bpf"
	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

// Watching is looking on: what an enforcing scope would redirect, refuse or reserve goes its way.
func TestWatchChangesNothing(t *testing.T) {
	w := newWorld(t, authz.Watch, nil)
	w.serve("192.0.2.2:80")
	w.serve("[2001:db8::2]:80")
	dev := deviceOf(t, w, "192.0.2.1")
	for _, j := range []job{
		{To: "192.0.2.2:80"}, {To: "[2001:db8::2]:80"}, {To: "192.0.2.2:80", V6: true},
		{To: "192.0.2.2:80", Bind: "0.0.0.0:700"},
		{To: "192.0.2.2:80", Device: dev.name},
		{To: "192.0.2.2:80", How: "fastopen"},
		{To: "192.0.2.2:80", Proto: unix.IPPROTO_MPTCP},
	} {
		w.run(j).want(t, "app")
	}
	for _, j := range []job{
		{Bind: "0.0.0.0:0", Type: unix.SOCK_RAW, Proto: unix.IPPROTO_ICMP},
		{Bind: "0.0.0.0:0", Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_UDPLITE},
		{Bind: "0.0.0.0:15001"}, {Bind: "0.0.0.0:15006"}, {Bind: "0.0.0.0:15008"},
	} {
		j.Only = true
		w.run(j).want(t, "")
	}
	e := w.event(capture.Connected, func(e capture.Event) bool { return e.Flow.Source.Port() == 700 })
	if !e.Bypassing {
		t.Error("a privileged source port is not shown as one that would be left alone")
	}
	e = w.event(capture.Connected, func(e capture.Event) bool { return !e.Bypassing })
	if e.Flow.Destination.String() != "192.0.2.2:80" || e.Flow.Caller.PID == 0 || e.Flow.Caller.Source != workload.SourceHook || e.Protocol != 6 {
		t.Errorf("event %+v", e)
	}
	if w.counter(bpf.Captured)+w.counter(bpf.Steered)+w.counter(bpf.PortReserved) != 0 {
		t.Error("something was touched")
	}
}

// A privileged source port may be the kernel's own (NFS): outside of enforce it goes its way, and is shown.
func TestDryRunLeavesPrivilegedPorts(t *testing.T) {
	w := newWorld(t, authz.DryRun, nil)
	w.serve("192.0.2.2:80")
	w.run(job{To: "192.0.2.2:80", Bind: "0.0.0.0:701"}).want(t, "app")
	w.event(capture.Connected, func(e capture.Event) bool { return e.Bypassing && e.Flow.Source.Port() == 701 })
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
	w.run(job{Bind: "0.0.0.0:0", Type: unix.SOCK_RAW, Proto: unix.IPPROTO_ICMP, Only: true}).want(t, "")
}

func TestAgentGone(t *testing.T) {
	kill := map[string]func(w *world){
		"listener closed": func(w *world) { w.silence() },
		"heartbeat stale": func(w *world) {
			w.stopRun()
			nettest.Wait(w.t, "the heartbeat to age", func() bool { return len(w.b().Verify("s")) > 0 })
		},
	}
	for _, c := range []struct {
		mode authz.Mode
		down capture.OnAgentDown
		want string // empty: refused
	}{{authz.Enforce, capture.DownClosed, ""}, {authz.Enforce, capture.DownOpen, "app"}, {authz.DryRun, capture.DownClosed, "app"}} {
		for how, gone := range kill {
			t.Run(fmt.Sprint(c.mode, " ", c.down, " ", how), func(t *testing.T) {
				w := newWorld(t, c.mode, func(s *capture.Scope) { s.OnAgentDown = c.down })
				w.serve("192.0.2.2:80")
				w.serve("[2001:db8::2]:80")
				gone(w)
				for _, j := range []job{{To: "192.0.2.2:80"}, {To: "[2001:db8::2]:80"}, {To: "192.0.2.2:80", V6: true}} {
					if c.want == "" {
						w.run(j).wantError(t, "connect", unix.ECONNREFUSED)
					} else {
						w.run(j).want(t, c.want)
					}
				}
			})
		}
	}
}

func TestPortsAreReservedWhileAgentIsGone(t *testing.T) {
	for _, mode := range []authz.Mode{authz.DryRun, authz.Enforce} {
		w := newWorld(t, mode, nil)
		w.silence()
		w.stopRun()
		for _, uid := range []int{0, 65534} {
			for _, bind := range []string{"127.0.0.1:15001", "0.0.0.0:15006", "[::]:15008", "[::1]:15001", "[::ffff:127.0.0.1]:15001"} {
				w.run(job{Bind: bind, UID: uid, Only: true}).wantError(t, "bind", unix.EADDRINUSE)
			}
		}
		w.run(job{Bind: "0.0.0.0:15001", Type: unix.SOCK_DGRAM, Only: true}).want(t, "")
		// A bind to port 0 may be given one of ours.
		w.host.Exec(t, "sh", "-c", "echo 15001 15001 > /proc/sys/net/ipv4/ip_local_port_range")
		if r := w.run(job{Bind: "127.0.0.1:0", Only: true}); r.Step != "bind" {
			t.Errorf("an ephemeral bind took port 15001: %+v", r)
		}
		// The agent itself comes back.
		w.listen()
		w.silence()
	}
}

func TestRefusalIsPushedDown(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
	f := w.flow()
	unit := workload.Identity{Selectors: []workload.Selector{{Type: "systemd", Value: "id:x.service"}, {Type: "unix", Value: "uid:0"}}}
	w.b().Refused("s", f, unit)
	for range 2 { // two processes of one cgroup
		w.run(job{To: "192.0.2.2:80"}).wantError(t, "connect", unix.ECONNREFUSED)
		w.run(job{To: "192.0.2.2:80", V6: true}).wantError(t, "connect", unix.ECONNREFUSED)
	}
	w.event(capture.Refused, func(e capture.Event) bool { return e.Flow.Destination == f.Destination })
	w.run(job{To: "192.0.2.2:81"}).want(t, "agent")             // another destination
	w.run(job{To: "192.0.2.2:80", UID: 65534}).want(t, "agent") // another user
	run(t, w.host, otherDir, job{To: "192.0.2.2:80"}).want(t, "agent")

	w.b().PolicyChanged()
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
	if n := w.entries("rf_denies"); n != 0 {
		t.Errorf("%d refusals are left", n)
	}
	// What was decided by the policy that has just gone is not pushed down any more.
	w.b().Refused("s", f, unit)
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
}

// A refusal that rests on an executable holds for that process image only: the next process of the cgroup may be another.
func TestRefusalOfOneProcess(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
	f := w.flow()
	w.b().Refused("s", f, workload.Identity{Selectors: []workload.Selector{{Type: "systemd", Value: "id:x"}, {Type: "unix", Value: "path:/x"}}})
	w.b().Refused("s", f, workload.Identity{})
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
	if n := w.entries("rf_denies"); n != 1 {
		t.Errorf("%d refusals, want the one of the process", n)
	}
	f.Caller.StartTime = 0
	f.Destination = flowAddr("192.0.2.2:82")
	w.b().Refused("s", f, workload.Identity{})
	if n := w.entries("rf_denies"); n != 1 {
		t.Error("a refusal was pushed down for a bare pid")
	}
}

func TestSetMode(t *testing.T) {
	w := newWorld(t, authz.Watch, nil)
	w.serve("192.0.2.2:80")
	listen(t, w.host, appDir, "0.0.0.0:8080")
	dial := job{To: "192.0.2.2:80"}
	w.run(dial).want(t, "app")
	w.listen()
	for _, mode := range []authz.Mode{authz.Enforce, authz.DryRun, authz.Watch, authz.Enforce} {
		w.scope.Mode = mode
		if err := w.b().SetMode(context.Background(), w.scope); err != nil {
			t.Fatal(err)
		}
		want, in := "agent", "agent+app"
		if mode == authz.Watch {
			want, in = "app", "app"
		}
		w.run(dial).want(t, want)
		if got, _, err := w.call("192.0.2.1:8080"); got != in {
			t.Errorf("%s: inbound %q, %v; want %q", mode, got, err, in)
		}
		if bad := w.b().Verify("s"); len(bad) > 0 {
			t.Errorf("%s: %q", mode, bad)
		}
	}
	w.scope.Loopback = "sometimes"
	if err := w.b().SetMode(context.Background(), w.scope); err == nil {
		t.Error("an unknown loopback setting was accepted")
	}
	w.run(dial).want(t, "agent")
}

func TestTablesReturnToBaseline(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	listen(t, w.host, appDir, "0.0.0.0:8080")
	before := w.traffic()
	for range 50 {
		w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
		if got, _, err := w.call("192.0.2.1:8080"); got != "agent+app" {
			t.Fatalf("%q, %v", got, err)
		}
		w.flow()
		w.flow()
	}
	nettest.Wait(t, "tables to return to "+before, func() bool { return w.traffic() == before })
	if err := w.b().Remove(context.Background(), "s"); err != nil {
		t.Fatal(err)
	}
	for _, table := range w.b().Tables() {
		if table.Entries != 0 {
			t.Errorf("after removing the scope %s holds %d entries", table.Name, table.Entries)
		}
	}
	var errno syscall.Errno = unix.ECONNREFUSED
	w.run(job{To: "192.0.2.2:80"}).wantError(t, "connect", errno) // nobody captures, nobody serves
}

// traffic is the fill of the tables that connections write.
func (w *world) traffic() string {
	var out []int
	for _, name := range []string{"rf_notes", "rf_exempt", "rf_ports", "rf_listeners", "rf_denies"} {
		out = append(out, w.entries(name))
	}
	return fmt.Sprint(out)
}
