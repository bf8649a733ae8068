package ebpf_test

import (
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/bpf"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

// call dials from the peer's namespace, outside of any scope, and returns what it is told.
func (w *world) call(addr string) (got, local string, err error) {
	w.t.Helper()
	var c net.Conn
	err = func() error {
		return w.peer.Do(func() (err error) {
			c, err = net.DialTimeout("tcp", addr, 5*time.Second)
			return err
		})
	}()
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	text, err := io.ReadAll(c)
	return string(text), c.LocalAddr().String(), err
}

func TestInboundIsSteeredAndServerSeesClient(t *testing.T) {
	for _, mode := range []authz.Mode{authz.DryRun, authz.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			var seeded *server
			w := newWorld(t, mode, nil)
			// One server before the scope is added, and the others after.
			w.stopRun()
			if err := w.b().Remove(t.Context(), "s"); err != nil {
				t.Fatal(err)
			}
			seeded = listen(t, w.host, appDir, "0.0.0.0:8081")
			w.b().Close(true)
			w.open()
			servers := map[string]*server{
				"192.0.2.1:8081":     seeded,
				"192.0.2.1:8082":     listen(t, w.host, appDir, "192.0.2.1:8082"),
				"[2001:db8::1]:8083": listen(t, w.host, appDir, "[2001:db8::1]:8083"),
			}
			both := listen(t, w.host, appDir, "[::]:8084")
			servers["192.0.2.1:8084"], servers["[2001:db8::1]:8084"] = both, both
			for addr, srv := range servers {
				got, local, err := w.call(addr)
				if err != nil || got != "agent+app" {
					t.Errorf("%s: %q, %v", addr, got, err)
					continue
				}
				f := w.flow()
				if f.Direction != flow.Inbound || f.Destination.String() != addr || f.Source.String() != local {
					t.Errorf("%s: flow %+v from %s", addr, f, local)
				}
				if seen := srv.next(); seen.Peer != local && seen.Peer != "[::ffff:"+local[:len("192.0.2.2")]+"]"+local[len("192.0.2.2"):] {
					t.Errorf("server on %s saw %s, want %s", addr, seen.Peer, local)
				}
			}
			nettest.Wait(t, "exemptions to be taken out", func() bool { return w.entries("rf_exempt") == 0 })
			if _, _, err := w.call("192.0.2.1:9999"); err == nil {
				t.Error("a port without listener was answered")
			}
			if n := w.counter(bpf.Unsteered); n != 0 {
				t.Errorf("%d connections came unsteered", n)
			}
		})
	}
}

func TestInboundWithoutAgent(t *testing.T) {
	for _, c := range []struct {
		mode authz.Mode
		down capture.OnAgentDown
		pass bool
	}{{authz.DryRun, capture.DownClosed, true}, {authz.Enforce, capture.DownClosed, false}, {authz.Enforce, capture.DownOpen, true}} {
		t.Run(c.mode.String()+" "+string(c.down), func(t *testing.T) {
			w := newWorld(t, c.mode, func(s *capture.Scope) { s.OnAgentDown = c.down })
			listen(t, w.host, appDir, "[::]:8080")
			w.silence()
			for _, addr := range []string{"192.0.2.1:8080", "[2001:db8::1]:8080"} {
				got, _, err := w.call(addr)
				if c.pass && got != "app" {
					t.Errorf("%s: %q, %v; want the server", addr, got, err)
				}
				if !c.pass && err == nil {
					t.Errorf("%s: connected", addr)
				}
			}
		})
	}
}

// Watching changes nothing for a client, and records it.
func TestInboundWatched(t *testing.T) {
	w := newWorld(t, authz.Watch, nil)
	srv := listen(t, w.host, appDir, "0.0.0.0:8080")
	w.event(capture.Listening, func(e capture.Event) bool { return e.Flow.Destination.Port() == 8080 })
	got, local, err := w.call("192.0.2.1:8080")
	if err != nil || got != "app" {
		t.Fatalf("%q, %v", got, err)
	}
	if seen := srv.next(); seen.Peer != local {
		t.Errorf("server saw %s, want %s", seen.Peer, local)
	}
	e := w.event(capture.Accepted, func(e capture.Event) bool { return e.Flow.Source.String() == local })
	if e.Flow.Destination.String() != "192.0.2.1:8080" || e.Flow.Direction != flow.Inbound || e.Bypassing {
		t.Errorf("event %+v", e)
	}
	_ = srv.cmd.Process.Kill()
	w.event(capture.Closed, func(e capture.Event) bool { return e.Flow.Destination.Port() == 8080 })
}

// With loopback enforced, whoever reaches a port over lo without having been captured is handed to the agent.
func TestUncapturedLoopbackIsSteered(t *testing.T) {
	w := newWorld(t, authz.Enforce, func(s *capture.Scope) { s.Host, s.Loopback = true, capture.LoopbackEnforce })
	listen(t, w.host, appDir, "0.0.0.0:8080")
	if err := w.b().SetCgroups("s", []capture.Cgroup{{ID: cgroupID(t, otherDir)}}); err != nil {
		t.Fatal(err)
	}
	run(t, w.host, otherDir, job{To: "127.0.0.1:8080"}).want(t, "agent+app")
	if f := w.flow(); f.Direction != flow.Inbound || f.Destination.String() != "127.0.0.1:8080" {
		t.Errorf("flow %+v", f)
	}
}

// An exemption is the agent's alone: a dial that fails leaves none, and a client cannot borrow one.
func TestExemptionEndsWithDial(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	fd, err := w.scope.NS.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	client := flowAddr("192.0.2.2:5555")
	if err := w.b().BeforeConnect("s", fd, flowAddr("192.0.2.1:9999"), client, flow.Flow{}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, sockaddr("192.0.2.1:9999", false)); err != unix.ECONNREFUSED {
		t.Fatalf("dial to a port without listener: %v", err)
	}
	nettest.Wait(t, "the exemption to go", func() bool { return w.entries("rf_exempt") == 0 })
}

// A port table without room counts every port as listening, rather than letting one past the agent.
func TestPortTableFull(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	w.stopRun()
	if err := w.b().Close(true); err != nil {
		t.Fatal(err)
	}
	w.conf.Sizes["rf_ports"] = 2
	listen(t, w.host, appDir, "0.0.0.0:8081")
	w.open()
	for _, port := range []string{"8082", "8083", "8084"} {
		listen(t, w.host, appDir, "0.0.0.0:"+port)
	}
	for _, port := range []string{"8081", "8082", "8083", "8084"} {
		if got, _, err := w.call("192.0.2.1:" + port); got != "agent+app" {
			t.Errorf("port %s: %q, %v", port, got, err)
		}
	}
	if w.counter(bpf.PortsFull) == 0 {
		t.Error("the full table was not counted")
	}
}

// A server of an excepted cgroup is left alone inbound as well, known by hook or by seed; one port shared with a covered cgroup is not.
func TestExceptedServerIsNotSteered(t *testing.T) {
	w := newWorld(t, authz.Enforce, func(s *capture.Scope) { s.Host = true })
	w.stopRun()
	if err := w.b().Close(true); err != nil {
		t.Fatal(err)
	}
	for addr, cgroup := range map[string]string{"0.0.0.0:8081": otherDir, "192.0.2.1:8082": otherDir, "127.0.0.1:8082": appDir} {
		listen(t, w.host, cgroup, addr)
	}
	w.open()
	if err := w.b().SetCgroups("s", []capture.Cgroup{{ID: cgroupID(t, otherDir)}}); err != nil {
		t.Fatal(err)
	}
	for addr, cgroup := range map[string]string{"0.0.0.0:8083": otherDir, "192.0.2.1:8084": otherDir, "127.0.0.1:8084": appDir, "0.0.0.0:8085": appDir} {
		listen(t, w.host, cgroup, addr)
	}
	for port, want := range map[string]string{"8081": "app", "8082": "agent+app", "8083": "app", "8084": "agent+app", "8085": "agent+app"} {
		if got, _, err := w.call("192.0.2.1:" + port); got != want {
			t.Errorf("port %s: %q, %v; want %q", port, got, err, want)
		}
	}
	if n := w.counter(bpf.Unsteered); n != 0 {
		t.Errorf("%d connections came unsteered", n)
	}
}
