package ebpf_test

import (
	"net/netip"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/bpf"
	"ringfence.dev/policy/authz"
)

// What has no connect hook, or escapes the one it has, is refused when the socket is made.
func TestEnforceRefusesUnseenProtocols(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	for _, c := range []struct {
		name  string
		job   job
		errno syscall.Errno // zero: allowed
	}{
		{"TCP", job{Bind: "0.0.0.0:0"}, 0},
		{"UDP", job{Bind: "0.0.0.0:0", Type: unix.SOCK_DGRAM}, 0},
		{"UDP over IPv6", job{Bind: "[::]:0", Type: unix.SOCK_DGRAM}, 0},
		{"MPTCP", job{Bind: "0.0.0.0:0", Proto: unix.IPPROTO_MPTCP}, unix.EPROTONOSUPPORT},
		{"MPTCP over IPv6", job{Bind: "[::]:0", Proto: unix.IPPROTO_MPTCP}, unix.EPROTONOSUPPORT},
		{"UDP-Lite", job{Bind: "0.0.0.0:0", Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_UDPLITE}, unix.EPERM},
		{"UDP-Lite over IPv6", job{Bind: "[::]:0", Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_UDPLITE}, unix.EPERM},
		{"raw", job{Bind: "0.0.0.0:0", Type: unix.SOCK_RAW, Proto: unix.IPPROTO_TCP}, unix.EPERM},
		{"raw over IPv6", job{Bind: "[::]:0", Type: unix.SOCK_RAW, Proto: unix.IPPROTO_TCP}, unix.EPERM},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.job.Only = true
			if r := w.run(c.job); c.errno == 0 {
				r.want(t, "")
			} else {
				r.wantError(t, "socket", c.errno)
			}
		})
	}
	e := w.event(capture.Bypass, func(e capture.Event) bool { return e.Protocol == unix.IPPROTO_UDPLITE })
	if e.Flow.Caller.PID == 0 || e.Comm == "" {
		t.Errorf("the event does not say who: %+v", e)
	}
	if w.counter(bpf.Protocol) != 6 {
		t.Errorf("%d refusals counted, want 6", w.counter(bpf.Protocol))
	}
}

// Unconnected protocols are not ours: getaddrinfo connects UDP sockets only to sort addresses.
func TestUDPConnectIsUntouched(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	w.run(job{To: "192.0.2.2:53", Type: unix.SOCK_DGRAM}).want(t, "")
	if n := w.counter(bpf.Captured); n != 0 {
		t.Errorf("%d connections captured", n)
	}
}

// The three places in which a socket can change hands, in a host scope with an excepted cgroup: whoever of
// its maker and its user is covered, the connection is captured.
func TestSocketChangesCgroup(t *testing.T) {
	w := newWorld(t, authz.Enforce, func(s *capture.Scope) { s.Host = true })
	w.serve("192.0.2.2:80")
	other := cgroupID(t, otherDir)
	if err := w.b().SetCgroups("s", []capture.Cgroup{{ID: other, Covered: false}}); err != nil {
		t.Fatal(err)
	}
	dial := job{To: "192.0.2.2:80"}
	run(t, w.host, appDir, dial).want(t, "agent") // in neither list
	run(t, w.host, otherDir, dial).want(t, "app")
	e := w.event(capture.Connected, func(e capture.Event) bool { return e.Bypassing })
	if e.Flow.Caller.CgroupID != other {
		t.Errorf("bypass event names cgroup %d, want %d", e.Flow.Caller.CgroupID, other)
	}
	run(t, w.host, otherDir, job{To: "192.0.2.2:80", Join: appDir}).want(t, "agent")
	run(t, w.host, appDir, job{To: "192.0.2.2:80", Join: otherDir}).want(t, "agent")

	if err := w.b().SetCgroups("s", []capture.Cgroup{{ID: other, Covered: true}}); err != nil {
		t.Fatal(err)
	}
	run(t, w.host, otherDir, dial).want(t, "agent")
	if err := w.b().SetCgroups("s", nil); err != nil || w.entries("rf_cgroups") != 0 {
		t.Errorf("emptying the cgroup table: %v, %d entries left", err, w.entries("rf_cgroups"))
	}
}

// Cgroups are the host scope's rule; in a namespace of its own every process is covered.
func TestNamespaceScopeHasNoExceptions(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	if err := w.b().SetCgroups("s", []capture.Cgroup{{ID: cgroupID(t, otherDir)}}); err != nil {
		t.Fatal(err)
	}
	run(t, w.host, otherDir, job{To: "192.0.2.2:80"}).want(t, "agent")
}

func TestBoundDeviceIsClearedAndNoted(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	dev := deviceOf(t, w, "192.0.2.1")
	w.run(job{To: "192.0.2.2:80", Device: dev.name}).want(t, "agent")
	if f := w.flow(); f.Device != dev.index {
		t.Errorf("device %d, want %d", f.Device, dev.index)
	}
	w.run(job{To: "192.0.2.2:80", Bind: "192.0.2.1:0"}).want(t, "agent")
	if f := w.flow(); f.BoundSource != netip.MustParseAddr("192.0.2.1") || f.Device != 0 {
		t.Errorf("bound source %s, device %d", f.BoundSource, f.Device)
	}
}

func TestLinkLocalAndGroupsAreNotRewritten(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	for _, to := range []string{"224.0.0.1:80", "255.255.255.255:80", "192.0.2.255:80", "[ff02::1]:80", "[fe80::1]:80"} {
		if r := w.run(job{To: to}); r.Step != "connect" || r.Errno == unix.ECONNREFUSED {
			t.Errorf("%s: %+v; want the kernel's own error", to, r)
		}
	}
	if n := w.counter(bpf.Captured); n != 0 {
		t.Errorf("%d of them were captured", n)
	}
}

// Where the namespace has no route the kernel's own error stands, and a route that comes is followed.
func TestNoRoute(t *testing.T) {
	for _, mode := range []authz.Mode{authz.DryRun, authz.Enforce} {
		t.Run(mode.String(), func(t *testing.T) {
			w := newWorld(t, mode, nil)
			w.run(job{To: "198.51.100.1:80"}).wantError(t, "connect", unix.ENETUNREACH)
			w.run(job{To: "[2001:db8:1::1]:80"}).wantError(t, "connect", unix.ENETUNREACH)
			w.host.Exec(t, "ip", "route", "add", "unreachable", "203.0.113.0/24")
			w.host.Exec(t, "ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.2", "src", "192.0.2.1")
			waitCaptured(t, w, job{To: "198.51.100.1:80"})
			w.run(job{To: "203.0.113.1:80"}).wantError(t, "connect", unix.EHOSTUNREACH)
			w.host.Exec(t, "ip", "route", "del", "198.51.100.0/24")
			eventually(t, w, job{To: "198.51.100.1:80"}, "connect", unix.ENETUNREACH)
			// Policy routing: the main table is no longer the whole answer, so everything is redirected.
			w.host.Exec(t, "ip", "rule", "add", "from", "192.0.2.77", "table", "77")
			waitCaptured(t, w, job{To: "198.51.100.1:80"})
		})
	}
}

func TestUnspecifiedDestinationIsLoopback(t *testing.T) {
	w := newWorld(t, authz.Enforce, func(s *capture.Scope) { s.Loopback = capture.LoopbackEnforce })
	for to, want := range map[string]string{"0.0.0.0:80": "127.0.0.1:80", "[::]:80": "[::1]:80", "[::ffff:0.0.0.0]:80": "127.0.0.1:80"} {
		w.run(job{To: to}).want(t, "agent")
		if f := w.flow(); f.Destination.String() != want {
			t.Errorf("%s was noted as %s, want %s", to, f.Destination, want)
		}
	}
}

func TestLoopbackSettings(t *testing.T) {
	for _, c := range []struct {
		setting capture.Loopback
		got     string
		event   bool
	}{{capture.LoopbackEnforce, "agent", false}, {capture.LoopbackObserve, "app", true}, {capture.LoopbackIgnore, "app", false}} {
		t.Run(string(c.setting), func(t *testing.T) {
			w := newWorld(t, authz.Enforce, func(s *capture.Scope) { s.Loopback = c.setting })
			srv := listen(t, w.host, appDir, "[::]:8080")
			for _, to := range []string{"127.0.0.1:8080", "[::1]:8080", "192.0.2.1:8080"} {
				w.run(job{To: to}).want(t, c.got)
				if c.event {
					w.event(capture.Connected, func(e capture.Event) bool { return e.Flow.Destination.String() == to && !e.Bypassing })
				}
			}
			_ = srv
		})
	}
}

// A dial to the agent's own port arrives without a note and gets nothing, whoever captures loopback.
func TestDirectDialGetsNothing(t *testing.T) {
	for _, setting := range []capture.Loopback{capture.LoopbackEnforce, capture.LoopbackObserve} {
		w := newWorld(t, authz.Enforce, func(s *capture.Scope) { s.Loopback = setting })
		for _, to := range []string{"127.0.0.1:15001", "[::1]:15001", "127.0.0.1:15006", "192.0.2.1:15006"} {
			if r := w.run(job{To: to}); r.Got != "" || r.Errno != unix.ECONNRESET {
				t.Errorf("%s: %+v; want a reset", to, r)
			}
		}
		select {
		case f := <-w.flows:
			t.Errorf("a direct dial became %+v", f)
		default:
		}
	}
}

// Dry-run leaves alone what a relay would change for the program: the route that a mark
// chooses, and the names of a Multipath TCP socket, which is not the one that connect shows.
func TestDryRunLeavesMarksAndMultipath(t *testing.T) {
	w := newWorld(t, authz.DryRun, nil)
	w.serve("192.0.2.2:80")
	jobs := map[bpf.Reason]job{bpf.Marked: {To: "192.0.2.2:80", Mark: 7}}
	if text, err := os.ReadFile("/proc/sys/net/mptcp/enabled"); err == nil && text[0] == '1' {
		jobs[bpf.Multipath] = job{To: "192.0.2.2:80", Proto: unix.IPPROTO_MPTCP}
	}
	for reason, j := range jobs {
		r := w.run(j)
		r.want(t, "app")
		if r.Peer != "192.0.2.2:80" || w.counter(reason) != 1 {
			t.Errorf("%s: peer %s, counted %d times", reason, r.Peer, w.counter(reason))
		}
		w.event(capture.Connected, func(e capture.Event) bool { return e.Bypassing && e.Flow.Caller.PID == uint32(r.PID) })
	}
	w.run(job{To: "192.0.2.2:80"}).want(t, "agent")
}
