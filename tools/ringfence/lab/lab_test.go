package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

// testLab brings a lab up under a name of its own, and down afterwards.
func testLab(t *testing.T, o Options) *Lab {
	t.Helper()
	nettest.RequireRoot(t)
	o.Name = testName(t)
	l, err := Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// testName is a lab's name for this test, removed with all that carries it.
func testName(t *testing.T) string {
	t.Helper()
	name := "t" + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(int(time.Now().UnixNano()%1e6))
	if err := os.MkdirAll(filepath.Dir(pinOf("x")), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Down(context.Background(), name, ""); err != nil {
			t.Error("down:", err)
		}
		wantNothing(t, name)
	})
	return name
}

// wantNothing fails when anything named after the lab is left on the machine.
func wantNothing(t *testing.T, name string) {
	t.Helper()
	root, err := cgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{
		filepath.Join(runDir, name+"*"), filepath.Join(netnsDir, "rf-"+name+"*"),
		filepath.Join(root, "rf-"+name), pinOf(name + "-*"),
	} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	for _, pid := range allPIDs() {
		cmdline, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
		if bytes.Contains(cmdline, []byte("/"+name+"/")) {
			t.Errorf("left running: %d %q", pid, cmdline)
		}
	}
}

func fault(t *testing.T, host, what string) {
	t.Helper()
	path := filepath.Join(filepath.Dir(pinOf("x")), "fault-"+host)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(what), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
}

func TestOptionsRefused(t *testing.T) {
	for _, o := range []Options{
		{Name: "Lab"}, {Name: "../x"}, {Name: "a-"}, {Name: strings.Repeat("x", 21)},
		{Capture: "magic"}, {Agents: []string{"c"}}, {Agents: []string{"a", "b", "a"}}, {Agents: []string{""}}, {Mode: "off"},
		{TrustDomain: "https://lab.test"}, {TrustDomain: "Lab Test"},
		{Policies: "/nonexistent"}, {Policies: "/etc/hostname"},
	} {
		if _, err := Up(t.Context(), o); err == nil {
			t.Errorf("Up(%+v) succeeded", o)
		}
	}
}

func TestHostsReachEachOther(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	for _, want := range []string{"192.0.2.2", "2001:db8::2"} {
		at := netip.AddrPortFrom(netip.MustParseAddr(want), 7000)
		server := listenOn(t, l, "b", at)
		go func() {
			if c, err := server.Accept(); err == nil {
				c.Write([]byte(c.RemoteAddr().String()))
				c.Close()
			}
		}()
		cmd := exec.Command("bash", "-c", "cat </dev/tcp/"+want+"/7000")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := l.Start("a", "", cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v: %s", err, &out)
		}
		if from, err := netip.ParseAddrPort(out.String()); err != nil || !isAddress("a", from.Addr()) {
			t.Errorf("%s saw a client at %q, want host a", want, &out)
		}
	}
}

func isAddress(host string, ip netip.Addr) bool {
	v4, v6 := Address(host)
	return ip == v4 || ip == v6
}

func listenOn(t *testing.T, l *Lab, host string, at netip.AddrPort) (server net.Listener) {
	t.Helper()
	ns, err := netns.Open(l.NetNS(host))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() (err error) {
		server, err = net.Listen("tcp", at.String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return server
}

func TestIPNetNSSeesTheHosts(t *testing.T) {
	ip, err := exec.LookPath("ip")
	if err != nil {
		t.Skip("iproute2 is not installed")
	}
	l := testLab(t, Options{Capture: "off"})
	out, err := exec.Command(ip, "-n", l.nsName("b"), "-br", "addr", "show", "dev", Device).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "192.0.2.2/24") || !strings.Contains(string(out), "2001:db8::2/64") {
		t.Errorf("ip netns shows %q (%v)", out, err)
	}
}

func TestSecondUpIsRefused(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	if _, err := Up(t.Context(), Options{Name: l.opts.Name, Capture: "off"}); !errors.Is(err, ErrUp) {
		t.Errorf("second up: %v", err)
	}
	if _, err := Open("rf-none"); !errors.Is(err, ErrDown) {
		t.Errorf("open of no lab: %v", err)
	}
}

func TestTwoCommandsAtOnce(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	unlock, err := lock(l.opts.Name)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Down(t.Context()); err == nil {
		t.Error("down beside another command succeeded")
	}
	unlock()
}

// run runs the test binary as the ringfence command.
func run(t *testing.T, l *Lab, args ...string) (out string, code int) {
	t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{"lab", "--name", l.opts.Name}, args...)...)
	text, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(text), cmd.ProcessState.ExitCode()
}

func TestExec(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	out, code := run(t, l, "exec", "a", "--unit", "shop", "--", "sh", "-c",
		"cat /proc/self/cgroup; readlink /proc/self/ns/net; echo $RINGFENCE_SOCKET; echo $PATH; exit 7")
	if code != 7 {
		t.Errorf("exit code %d, want the program's", code)
	}
	var st unix.Stat_t
	if err := unix.Stat(l.NetNS("a"), &st); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"0::" + l.UnitRoot("a") + "/shop.service\n",
		"net:[" + strconv.FormatUint(st.Ino, 10) + "]\n",
		l.Socket("a") + "\n", filepath.Dir(exe) + ":",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("program on host a does not show %q:\n%s", want, out)
		}
	}
}

func TestExecExitCodes(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	for _, c := range []struct {
		want int
		args []string
	}{
		{127, []string{"a", "--", "no-such-program"}},
		{127, []string{"a", "--", "/no/such/program"}},
		{126, []string{"a", "--", "/etc/hostname"}},
		{126, []string{"c", "--", "true"}},
		{126, []string{"a", "--unit", "../../x", "--", "true"}},
		{126, []string{"a", "--unit", "..", "--", "true"}},
		{0, []string{"b", "--", "true"}},
	} {
		if out, code := run(t, l, append([]string{"exec"}, c.args...)...); code != c.want {
			t.Errorf("exec %q: exit code %d, want %d: %s", c.args, code, c.want, out)
		}
	}
}

func TestExecSignalIsNatural(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	cmd := exec.Command(os.Args[0], "lab", "--name", l.opts.Name, "exec", "a", "--unit", "nap", "--", "sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	nettest.Wait(t, "the program to run in its unit", func() bool {
		comm, _ := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/comm")
		return string(comm) == "sleep\n" && len(l.units("a")["nap"]) == 1
	})
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != syscall.SIGTERM {
		t.Errorf("program ended by %v, want the signal", cmd.ProcessState)
	}
}

func TestDownEndsPrograms(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	inUnit := exec.Command("sh", "-c", "trap '' TERM; sleep 100")
	plain := exec.Command("sleep", "100")
	if err := errors.Join(l.Start("a", "stubborn", inUnit), l.Start("b", "", plain)); err != nil {
		t.Fatal(err)
	}
	status := l.Status(t.Context())
	if status[0].Programs == 0 || status[1].Programs != 1 || strings.Join(status[0].Units, " ") != "stubborn" {
		t.Errorf("status does not show the programs: %+v", status)
	}
	if err := Down(t.Context(), l.opts.Name, ""); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []*exec.Cmd{inUnit, plain} {
		if err := cmd.Wait(); err == nil {
			t.Errorf("%v was not ended", cmd)
		}
	}
	wantNothing(t, l.opts.Name)
	if err := Down(t.Context(), l.opts.Name, ""); err != nil {
		t.Error("second down:", err)
	}
}

func TestDownWithoutState(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	nap := exec.Command("sleep", "100")
	if err := l.Start("a", "nap", nap); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(l.Dir()); err != nil {
		t.Fatal(err)
	}
	if err := Down(t.Context(), l.opts.Name, ""); err != nil {
		t.Error(err)
	}
	nap.Wait()
	wantNothing(t, l.opts.Name)
}

func TestStatusJSON(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	out, code := run(t, l, "status", "-o", "json")
	var all []HostStatus
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 0 || len(all) != 2 {
		t.Fatalf("%v (exit %d): %s", err, code, out)
	}
	if all[0].Agent != "none" || all[1].Host != "b" || all[0].Units == nil {
		t.Errorf("%+v", all)
	}
	if _, code := run(t, l, "status", "-o", "xml"); code == 0 {
		t.Error("an unknown output format is accepted")
	}
}

func TestStartHere(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	cmd := exec.Command("cat", "/proc/self/cgroup")
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := l.StartHere("local", cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "0::"+l.UnitRoot(Here)+"/local.service\n") {
		t.Errorf("%v: %s", err, &out)
	}
	nap := exec.Command("sleep", "100")
	if err := l.StartHere("nap", nap); err != nil {
		t.Fatal(err)
	}
	if err := l.Down(t.Context()); err != nil {
		t.Error(err)
	}
	nap.Wait()
}

func TestCountSockets(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:3AA0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 020200C0:0050 010200C0:3AA0 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1
   2: 020200C0:AAA0 010200C0:0050 01 00000000:00000000
garbage
`
	for _, c := range []struct {
		port  uint16
		state SocketState
		want  int
	}{{15008, Listening, 1}, {15008, Established, 1}, {80, Established, 2}, {80, Listening, 0}, {43680, Listening, 0}} {
		if got := countSockets(table, c.port, c.state); got != c.want {
			t.Errorf("port %d in state %s: %d, want %d", c.port, c.state, got, c.want)
		}
	}
}

func TestWaitListening(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.WaitListening(ctx, "b", 7000); !errors.Is(err, context.Canceled) {
		t.Errorf("wait for nobody: %v", err)
	}
	listenOn(t, l, "b", netip.MustParseAddrPort("[2001:db8::2]:7000"))
	if err := l.WaitListening(t.Context(), "b", 7000); err != nil {
		t.Error(err)
	}
}
