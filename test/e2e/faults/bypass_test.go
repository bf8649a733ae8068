package faults_test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/doctor"
	"ringfence.dev/test/nettest"
)

// way is one way to connect that has got past redirection somewhere.
type way struct {
	name string
	job  job
	only string // the mode of capture in which it is captured; empty for both
	// In the other mode the call that must fail, and how; any error when zero.
	step  string
	errno syscall.Errno
}

var ways = []way{
	{name: "plain", job: job{To: "192.0.2.2:80"}},
	{name: "IPv6", job: job{To: "[2001:db8::2]:80"}},
	{name: "IPv4 in an IPv6 socket", job: job{To: "192.0.2.2:80", V6: true}},
	{name: "connect after disconnect", job: job{To: "192.0.2.2:80", How: "reconnect"}},
	{name: "io_uring", job: job{To: "192.0.2.2:80", How: "io_uring"}},
	{name: "fast open", job: job{To: "192.0.2.2:80", How: "fastopen"}},
	{name: "fast open by connect", job: job{To: "192.0.2.2:80", How: "fastopen_connect"}},
	{name: "another mesh's mark", job: job{To: "192.0.2.2:80", Mark: 0x539}},
	{name: "a capture mark", job: job{To: "192.0.2.2:80", Mark: 0x1000}},
	{name: "another mesh's user", job: job{To: "192.0.2.2:80", UID: 1337}},
	{name: "bound source", job: job{To: "192.0.2.2:80", Bind: "192.0.2.1:0"}},
	{name: "privileged source port", job: job{To: "192.0.2.2:80", Bind: "192.0.2.1:700"}},
	{name: "Multipath TCP", job: job{To: "192.0.2.2:80", Proto: unix.IPPROTO_MPTCP}, only: "iptables", step: "socket", errno: unix.EPROTONOSUPPORT},
}

// Every way of connecting is captured, or cannot be gone at all.
func TestWaysPastCapture(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t).in(sharedAgent(t, capture), "enforce")
		far4, far6 := w.listen("192.0.2.2:80"), w.listen("[2001:db8::2]:80")
		// The device's name is known only here. Redirection by packet filter loses such a SYN, which closes the way.
		device := way{name: "bound to a device", job: job{To: "192.0.2.2:80", Device: w.dev, Wait: 2 * time.Second}, only: "ebpf", step: "connect"}
		for _, c := range append(ways, device) {
			t.Run(c.name, func(t *testing.T) {
				w := w.on(t)
				far := far4
				if c.job.To[0] == '[' {
					far = far6
				}
				if r := w.isRefused("thief", c.job, far); c.errno != 0 && c.only != capture && (r.Step != c.step || r.Errno != c.errno) {
					t.Errorf("%v; want %v in %s", r, c.errno, c.step)
				}
				if c.only == "" || c.only == capture {
					w.passes("shop", c.job, far)
				}
			})
		}
		t.Run("nested cgroup", func(t *testing.T) {
			for unit, want := range map[string]string{"shop": "app", "thief": ""} {
				dir := filepath.Join(unitDir(t, unit), "nested")
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				p := launchAs(t, w.host, dir, "/proc/self/exe", job{To: "192.0.2.2:80"})
				if r := p.next(); r.Got != want {
					t.Errorf("%s: %v", unit, r)
				}
				p.end()
			}
			far4.clients()
		})
		t.Run("a socket made by another", func(t *testing.T) {
			w.on(t).isRefused("thief", job{To: "192.0.2.2:80", Given: true}, far4, socketIn(t, w.host))
		})
		t.Run("magic address", func(t *testing.T) { // one that takes a namespace out of another mesh
			w.run("thief", job{To: "0.0.0.2:930", Wait: 1 * time.Second})
			w.on(t).isRefused("thief", job{To: "192.0.2.2:80"}, far4)
		})
	})
}

// Protocols that no connect hook sees must not leave an enforcing scope.
func TestOtherProtocols(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t).in(sharedAgent(t, capture), "enforce")
		for name, j := range map[string]job{
			"UDP-Lite":         {To: "192.0.2.2:9", Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_UDPLITE, Send: "x"},
			"UDP-Lite on IPv6": {To: "[2001:db8::2]:9", Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_UDPLITE, Send: "x"},
		} {
			t.Run(name, func(t *testing.T) { w.on(t).neverArrives(j) })
		}
		for name, j := range map[string]job{
			"SCTP":     {To: "192.0.2.2:9", Proto: unix.IPPROTO_SCTP},
			"raw ICMP": {To: "192.0.2.2:9", Type: unix.SOCK_RAW, Proto: unix.IPPROTO_ICMP, Only: true},
			"raw TCP":  {To: "192.0.2.2:9", Type: unix.SOCK_RAW, Proto: unix.IPPROTO_TCP, Only: true},
		} {
			r := w.run("thief", j)
			if capture == "ebpf" && r.Step != "socket" {
				t.Errorf("%s: %v; want no such socket", name, r)
			}
		}
	})
}

// neverArrives sends one datagram as the thief. A second one, from the stranger
// to himself, says when the first ought to have come.
func (w *site) neverArrives(j job) {
	w.t.Helper()
	var fd int
	family := unix.AF_INET
	if j.To[0] == '[' {
		family = unix.AF_INET6
	}
	err := w.stranger.Do(func() (err error) {
		if fd, err = unix.Socket(family, j.Type, j.Proto); err != nil {
			return err
		}
		return unix.Bind(fd, sockaddr(j.To, false))
	})
	if err != nil {
		w.t.Fatal(err)
	}
	defer unix.Close(fd)
	w.run("thief", j)
	if err := unix.Sendto(fd, []byte("control"), 0, sockaddr(j.To, false)); err != nil {
		w.t.Fatal(err)
	}
	buf := make([]byte, 20)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if got := string(buf[:max(n, 0)]); err != nil || got != "control" {
		w.t.Errorf("%+v: %q arrived, %v", j, got, err)
	}
}

// Whoever dials the agent's own ports gets nothing, and learns nothing.
func TestDirectDial(t *testing.T) {
	forEachCapture(t, func(t *testing.T, kind string) {
		w := newSite(t).in(sharedAgent(t, kind), "enforce", "--loopback", "enforce")
		const text = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
		for _, host := range []string{"127.0.0.1", "192.0.2.1", "[::1]", "[2001:db8::1]"} {
			for _, port := range []int{capture.OutboundPort, capture.InboundPort} {
				to := fmt.Sprintf("%s:%d", host, port)
				if r := w.run("shop", job{To: to, Send: text}); r.Got != "" || r.Step == "" {
					t.Errorf("shop dials %s: %v", to, r)
				}
			}
		}
		for _, host := range []string{"192.0.2.1", "[2001:db8::1]"} {
			for _, port := range []int{capture.OutboundPort, capture.InboundPort, capture.TunnelPort} {
				to := fmt.Sprintf("%s:%d", host, port)
				if got := w.say(to, text); got != "" {
					t.Errorf("a stranger who dials %s is answered %q", to, got)
				}
			}
		}
	})
}

// say sends text from the stranger's namespace and returns all that comes back.
func (w *site) say(addr, text string) (got string) {
	w.t.Helper()
	_ = w.stranger.Do(func() error {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := c.Write([]byte(text)); err != nil {
			return err
		}
		_ = c.(*net.TCPConn).CloseWrite()
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		got = string(buf[:n])
		return err
	})
	return got
}

// Rules that somebody with CAP_NET_ADMIN takes away come back by themselves.
func TestFlushedRules(t *testing.T) {
	nettest.RequireRoot(t)
	a := sharedAgent(t, "iptables")
	w := newSite(t).in(a, "enforce")
	far := w.listen("192.0.2.2:80")
	before := w.rules()
	for _, tool := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"nat", "mangle", "filter"} {
			w.host.Exec(t, tool, "-t", table, "-F")
		}
	}
	if sc := a.scope(w.name); sc.Protected {
		t.Error("a scope without rules is reported as protected")
	}
	nettest.WaitFor(t, 45*time.Second, "the rules to be written again", func() bool { return w.rules() == before })
	w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
	w.passes("shop", job{To: "192.0.2.2:80"}, far)
}

// known are the rows that doctor tells about ways past capture: whether they are
// closed in each mode. A closed one is held closed by the test named.
var known = map[string]struct {
	ebpf, iptables bool
	by             string
}{
	"connect, io_uring, TCP fast open":                {true, true, "TestWaysPastCapture"},
	"IPv4 inside IPv6 sockets":                        {true, true, "TestWaysPastCapture"},
	"Multipath TCP":                                   {true, true, "TestWaysPastCapture"},
	"UDP-Lite, SCTP, DCCP sockets":                    {true, true, "TestOtherProtocols"},
	"raw IP sockets":                                  {true, false, "TestOtherProtocols"},
	"traffic forwarded for another namespace":         {false, false, ""},
	"packet, vsock, SMC, XDP and TIPC sockets":        {false, false, ""},
	"sockets received from outside the scope":         {true, false, "TestHostScopeBypass"},
	"connections open before the scope was added":     {false, false, "TestOpenBefore"},
	"binding the agent's ports while it is down":      {true, true, "TestKilledAgent"},
	"becoming another program after connect":          {true, false, "TestExecAfterConnect"},
	"UDP, QUIC":                                       {false, false, ""},
	"moving a process out of its cgroup (host scope)": {false, false, "TestHostScopeBypass"},
	"rules removed by a program with CAP_NET_ADMIN":   {true, false, "TestFlushedRules"},
}

// What is not closed is named by doctor for the capture that is configured, with what it costs.
func TestDoctorNamesWhatIsOpen(t *testing.T) {
	forEachCapture(t, func(t *testing.T, kind string) {
		a := sharedAgent(t, kind)
		out, _ := a.command("doctor", "-o", "json", "--config", filepath.Join(a.Dir, "agent.yaml"))
		var report doctor.Report
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if report.Capture != kind {
			t.Errorf("doctor says that capture is %s", report.Capture)
		}
		rows := 0
		for _, c := range report.Checks {
			if c.Group != "bypass" {
				continue
			}
			rows++
			k, ok := known[c.Name]
			if !ok {
				t.Errorf("no test is known for %q", c.Name)
				continue
			}
			closed := k.ebpf
			if kind == "iptables" {
				closed = k.iptables
			}
			if (c.State == doctor.Found) != closed {
				t.Errorf("%q: %s (%s); closed: %v", c.Name, c.State, c.Detail, closed)
			}
			if !closed && (c.Detail == "" || c.Cost == "") {
				t.Errorf("%q is open, and doctor does not say what that costs: %+v", c.Name, c)
			}
		}
		if rows != len(known) {
			t.Errorf("doctor has %d rows on ways past capture, want %d", rows, len(known))
		}
	})
}
