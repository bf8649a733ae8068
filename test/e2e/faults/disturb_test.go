package faults_test

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/test/nettest"
)

// What watching and dry-run must not change: programs that do unusual things with
// sockets see the same, and are seen the same, as without an agent.
func TestDisturbsNothing(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		for _, mode := range []string{"watch", "dry-run"} {
			t.Run(mode, func(t *testing.T) {
				w := newSite(t)
				w.unusualNetwork()
				far := w.listen("0.0.0.0:80")
				w.serveDNS()
				w.serve("web", "0.0.0.0:8080")
				w.resolve()
				without := w.unusual(far, 701)
				w.in(a, mode)
				with := w.on(t).unusual(far, 702)
				for name, want := range without {
					if mode == "dry-run" && capture == "iptables" && name == "bound to a device" {
						continue // lost by a redirect of the packet filter; the back end's documented limit
					}
					if mode == "dry-run" && slices.Contains(fails, name) {
						// The handshake is the agent's, so the failure comes after it, as a reset.
						if got := with[name]; got != want && !strings.Contains(got, "reset") {
							t.Errorf("%s: %s; without an agent: %s", name, got, want)
						}
						continue
					}
					if got := with[name]; got != want {
						t.Errorf("%s: %s; without an agent: %s", name, got, want)
					}
				}
			})
		}
	})
}

// fails are those that must fail one way or the other.
var fails = []string{"nobody listens", "no such host", "no route"}

// unusualNetwork gives the host a second address, and a route of its own to what is marked.
func (w *site) unusualNetwork() {
	// Who is not there is given up after three questions of a second each, unless told to be quicker.
	w.host.Exec(w.t, "sysctl", "-qw", "net.ipv4.neigh."+w.dev+".retrans_time_ms=100")
	w.host.Exec(w.t, "ip", "addr", "add", "192.0.2.9/24", "dev", w.dev)
	w.host.Exec(w.t, "ip", "addr", "add", "192.0.2.7/24", "dev", w.dev)
	w.host.Exec(w.t, "ip", "rule", "add", "fwmark", "7", "table", "77")
	w.host.Exec(w.t, "ip", "route", "add", "192.0.2.0/24", "dev", w.dev, "src", "192.0.2.7", "table", "77")
}

// unusual does all of it and tells, for each, what the program and the server saw.
func (w *site) unusual(far *far, port int) map[string]string {
	w.t.Helper()
	saw := map[string]string{}
	for name, j := range map[string]job{
		"plain":                  {To: "192.0.2.2:80"},
		"bound source":           {To: "192.0.2.2:80", Bind: "192.0.2.9:0"},
		"privileged source port": {To: "192.0.2.2:80", Bind: fmt.Sprintf("192.0.2.1:%d", port)},
		"marked":                 {To: "192.0.2.2:80", Mark: 7},
		"bound to a device":      {To: "192.0.2.2:80", Device: w.dev, Wait: 3 * time.Second},
		"Multipath TCP":          {To: "192.0.2.2:80", Proto: unix.IPPROTO_MPTCP},
		"nobody listens":         {To: "192.0.2.2:81", Wait: 3 * time.Second},
		"no such host":           {To: "192.0.2.77:80", Wait: 5 * time.Second},
		"no route":               {To: "198.51.100.1:80", Wait: 3 * time.Second},
		"raw ICMP":               {To: "192.0.2.2:9", Type: unix.SOCK_RAW, Proto: unix.IPPROTO_ICMP, Only: true},
		"UDP-Lite":               {To: "192.0.2.2:9", Type: unix.SOCK_DGRAM, Proto: unix.IPPROTO_UDPLITE, Only: true},
		"loopback":               {To: "127.0.0.1:8080"},
		"the agent's port":       {Bind: "0.0.0.0:15099", Only: true},
	} {
		far.clients()
		r := w.run("tool", j)
		saw[name] = fmt.Sprintf("%s: %v, %q, peer %s, server saw %v", r.Step, r.Errno, r.Got, r.Peer, comparable(far.clients(), j, port))
	}
	for name, argv := range map[string][]string{
		"ping":           {"ping", "-c1", "-W2", "192.0.2.2"},
		"traceroute":     {"traceroute", "-n", "-q1", "-w2", "192.0.2.2"},
		"TCP traceroute": {"traceroute", "-T", "-p80", "-n", "-q1", "-w2", "192.0.2.2"},
	} {
		saw[name] = w.program(argv)
	}
	far.clients()
	saw["DNS over TCP"] = w.resolve()
	return saw
}

// comparable leaves of client addresses what is the same each time: whether the
// port is the one that the client chose.
func comparable(clients []string, j job, chosen int) []string {
	for i, c := range clients {
		host, port, _ := net.SplitHostPort(c)
		clients[i] = host
		if strings.HasSuffix(j.Bind, ":"+strconv.Itoa(chosen)) {
			clients[i] = fmt.Sprintf("%s, port kept: %v", host, port == strconv.Itoa(chosen))
		}
	}
	return clients
}

// program runs a program of the system on the host and gives its exit code and who answered.
func (w *site) program(argv []string) string {
	w.t.Helper()
	path, err := exec.LookPath(argv[0])
	if err != nil {
		for _, dir := range []string{"/usr/sbin/", "/sbin/", "/bin/", "/usr/bin/"} {
			if p, e := exec.LookPath(dir + argv[0]); e == nil {
				path, err = p, nil
			}
		}
	}
	if err != nil {
		return "not installed"
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, argv[1:]...)
	var out []byte
	_ = w.host.Do(func() error {
		out, err = cmd.CombinedOutput()
		return nil
	})
	answers := slices.Compact(slices.DeleteFunc(strings.Fields(string(out)), func(f string) bool { return f != "192.0.2.2" }))
	return fmt.Sprintf("%v, answered by %v", err, answers)
}

// serveDNS answers every question of TCP port 53 on the stranger's side with no such name.
func (w *site) serveDNS() {
	w.t.Helper()
	l := w.stranger.Listen(w.t, "192.0.2.2:53")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 512)
			if n, err := c.Read(buf); err == nil && n > 5 {
				buf[4], buf[5] = 0x81, 0x83 // QR, RD, RA, NXDOMAIN (RFC 1035 section 4.1.1)
				_, _ = c.Write(buf[:n])
			}
			c.Close()
		}
	}()
}

// resolve asks the stranger for a name over TCP.
func (w *site) resolve() string {
	w.t.Helper()
	r := net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (c net.Conn, err error) {
		err = w.host.Do(func() (err error) {
			c, err = net.DialTimeout("tcp", "192.0.2.2:53", 5*time.Second)
			return err
		})
		return c, err
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := r.LookupHost(ctx, "orders.faults.test.")
	return fmt.Sprint(err)
}

// In dry-run what would be refused passes, and is recorded.
func TestDryRunRecords(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		a := sharedAgent(t, capture)
		w := newSite(t).in(a, "dry-run")
		far := w.listen("192.0.2.2:80")
		w.serve("web", "192.0.2.1:8080")
		w.passes("thief", job{To: "192.0.2.2:80"}, far)
		if got, err := w.ask("192.0.2.1:8080"); got != "app" {
			t.Errorf("inbound: %q, %v", got, err)
		}
		nettest.Wait(t, "both to be recorded as refusals that would be", func() bool {
			n := 0
			for _, d := range a.decisions(w.name) {
				if d.Effect.String() == "would_deny" {
					n++
				}
			}
			return n >= 2
		})
	})
}
