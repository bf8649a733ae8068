package ebpf_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/capture/ebpf"
	"ringfence.dev/attest/workload"
	"ringfence.dev/bpf"
	"ringfence.dev/cni/netns"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

// Programs of the tests are attached at a cgroup of the tests' own, which holds
// the agent (this process) and the workloads, so nothing else on the machine runs them.
var (
	treeRoot string
	agentDir string
	appDir   string
	otherDir string
	pinRoot  string
)

func TestMain(m *testing.M) {
	if text, ok := os.LookupEnv(helperEnv); ok {
		runHelper(text)
		return
	}
	if os.Getuid() != 0 {
		os.Exit(m.Run()) // the root tests skip, or fail, each by itself
	}
	undo, err := makeTree()
	if err != nil {
		fmt.Fprintln(os.Stderr, "test cgroups:", err)
		os.Exit(1)
	}
	// nettest and netns keep one standing thread each for the life of the process.
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(goleak.IgnoreAnyFunction("ringfence.dev/cni/netns.(*openerThread).start.func1")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	undo()
	os.Exit(code)
}

func makeTree() (undo func(), err error) {
	root, err := bpf.CgroupRoot()
	if err != nil {
		return nil, err
	}
	home, err := ownCgroup(root)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("rf-test-%d", os.Getpid())
	treeRoot = filepath.Join(root, name)
	agentDir, appDir, otherDir = filepath.Join(treeRoot, "agent"), filepath.Join(treeRoot, "app"), filepath.Join(treeRoot, "other")
	pinRoot = "/sys/fs/bpf/" + name
	for _, d := range []string{treeRoot, appDir, otherDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	if _, err := ebpf.JoinLeaf(treeRoot, "agent"); err != nil {
		return nil, err
	}
	return func() {
		_ = os.WriteFile(filepath.Join(home, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
		for _, d := range []string{agentDir, appDir, otherDir, treeRoot} {
			if err := os.Remove(d); err != nil {
				fmt.Fprintln(os.Stderr, "left behind:", err)
			}
		}
		_ = os.Remove(pinRoot)
	}, nil
}

func ownCgroup(root string) (string, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return filepath.Join(root, strings.TrimSpace(path)), nil
		}
	}
	return "", errors.New("not in a cgroup v2")
}

// world is a host with an agent (192.0.2.1, 2001:db8::1), a peer without one
// (.2), and the agent's back end on the host's namespace.
type world struct {
	t        *testing.T
	now      atomic.Pointer[ebpf.Backend] // of the running agent
	conf     ebpf.Config
	host     *nettest.NS
	peer     *nettest.NS
	scope    capture.Scope
	flows    chan flow.Flow
	outbound []net.Listener
	inbound  []net.Listener
	stopRun  func()
	closing  sync.WaitGroup

	mu     sync.Mutex
	events []capture.Event
}

var serial int

func newWorld(t *testing.T, mode authz.Mode, change func(*capture.Scope)) *world {
	t.Helper()
	nettest.RequireRoot(t)
	serial++
	w := &world{t: t, flows: make(chan flow.Flow, 100)}
	w.host, w.peer = nettest.NetNS(t, "rf-test-a"), nettest.NetNS(t, "rf-test-b")
	nettest.VethPair(t, w.host, w.peer, "192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "2001:db8::2/64")
	ns, err := netns.Open(w.host.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	w.conf = ebpf.Config{
		Instance: fmt.Sprintf("t%d", serial), PinRoot: pinRoot, CgroupRoot: treeRoot, AgentCgroup: agentDir,
		Sizes: map[string]uint32{"rf_notes": 512, "rf_exempt": 512, "rf_denies": 128},
	}
	w.scope = capture.Scope{Name: "s", NS: ns, Mode: mode, Loopback: capture.LoopbackObserve}
	if change != nil {
		change(&w.scope)
	}
	if mode != authz.Watch {
		w.listen()
	}
	w.open()
	t.Cleanup(func() {
		w.stopRun()
		if err := w.b().Close(true); err != nil {
			t.Error(err)
		}
		w.silence()
		w.closing.Wait()
	})
	return w
}

// open starts an agent: back end, scope, Run.
func (w *world) open() {
	w.t.Helper()
	b, err := ebpf.New(w.conf)
	if err != nil {
		w.t.Fatalf("%+v", err)
	}
	w.now.Store(b)
	if err := b.Add(context.Background(), w.scope); err != nil {
		b.Close(true)
		w.t.Fatalf("%+v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx, w.record) }()
	var once sync.Once
	w.stopRun = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				w.t.Error(err)
			}
		})
	}
}

func (w *world) b() *ebpf.Backend { return w.now.Load() }

func (w *world) record(e capture.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, e)
}

// event waits for an event of the kind that matches.
func (w *world) event(kind capture.EventKind, match func(capture.Event) bool) (found capture.Event) {
	w.t.Helper()
	nettest.Wait(w.t, fmt.Sprintf("event of kind %d", kind), func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, e := range w.events {
			if e.Kind == kind && match(e) {
				found = e
				return true
			}
		}
		return false
	})
	return found
}

// listen opens the agent's listeners in the host and serves them: outbound ones
// answer "agent", inbound ones carry on to the workload.
func (w *world) listen() {
	w.t.Helper()
	open := func(addr string) net.Listener {
		var l net.Listener
		network := "tcp4" // and tcp6 by itself: one listener per family, as an agent has them
		if addr[0] == '[' {
			network = "tcp6"
		}
		err := w.scope.NS.Do(func() (err error) {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false)
			l, err = lc.Listen(context.Background(), network, addr)
			return err
		})
		if err != nil {
			w.t.Fatal(err)
		}
		return l
	}
	w.outbound = []net.Listener{open("127.0.0.1:15001"), open("[::1]:15001")}
	w.inbound = []net.Listener{open("0.0.0.0:15006"), open("[::]:15006")}
	w.scope.Outbound, w.scope.Inbound = nil, nil
	for _, l := range w.outbound {
		w.scope.Outbound = append(w.scope.Outbound, fdOf(w.t, l))
		w.closing.Go(func() { w.accept(l, flow.Outbound) })
	}
	for _, l := range w.inbound {
		w.scope.Inbound = append(w.scope.Inbound, fdOf(w.t, l))
		w.closing.Go(func() { w.accept(l, flow.Inbound) })
	}
}

// silence closes the agent's listeners, as its death would.
func (w *world) silence() {
	for _, l := range append(w.outbound, w.inbound...) {
		l.Close()
	}
	w.outbound, w.inbound = nil, nil
}

func fdOf(t *testing.T, l net.Listener) (fd int) {
	t.Helper()
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err == nil {
		err = raw.Control(func(p uintptr) { fd = int(p) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func (w *world) accept(l net.Listener, d flow.Direction) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		f, err := w.b().Origin("s", d, -1, addrPort(c.LocalAddr()), addrPort(c.RemoteAddr()))
		if err != nil {
			_ = c.(*net.TCPConn).SetLinger(0) // reset
			c.Close()
			continue
		}
		w.flows <- f
		if d == flow.Outbound {
			_, _ = c.Write([]byte("agent"))
		} else {
			_, _ = c.Write([]byte("agent+" + w.carry(f)))
		}
		w.closing.Go(func() { finish(c.(*net.TCPConn)) })
	}
}

// finish sends FIN and waits for the other side's, so that nobody is cut by a reset.
func finish(c *net.TCPConn) {
	defer c.Close()
	_ = c.CloseWrite()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, _ = io.Copy(io.Discard, c)
}

// carry dials the workload for an inbound flow and returns what it says.
func (w *world) carry(f flow.Flow) string {
	family := unix.AF_INET
	if f.Destination.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := w.scope.NS.Socket(family, unix.SOCK_STREAM, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	if err := w.b().BeforeConnect("s", fd, f.Destination, f.Source, flow.Flow{}); err != nil {
		return err.Error()
	}
	if err := unix.Connect(fd, sockaddr(f.Destination.String(), family == unix.AF_INET6)); err != nil {
		return err.Error()
	}
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
	buf := make([]byte, 20)
	n, err := unix.Read(fd, buf)
	for err == unix.EINTR { // with a receive time-out the kernel does not restart it
		n, err = unix.Read(fd, buf)
	}
	return string(buf[:max(n, 0)])
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

// flow is the next connection that reached the agent.
func (w *world) flow() flow.Flow {
	w.t.Helper()
	select {
	case f := <-w.flows:
		return f
	case <-time.After(15 * time.Second):
		w.t.Fatal("waited 15 s for a captured connection")
		return flow.Flow{}
	}
}

// serve runs a plain server in the peer's namespace that says "app".
func (w *world) serve(addr string) {
	w.t.Helper()
	l := w.peer.Listen(w.t, addr)
	w.closing.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("app"))
			w.closing.Go(func() { finish(c.(*net.TCPConn)) })
		}
	})
	w.t.Cleanup(func() { l.Close() })
}

func (w *world) run(j job) result { w.t.Helper(); return run(w.t, w.host, appDir, j) }

func (w *world) counter(r bpf.Reason) uint64 {
	w.t.Helper()
	all, err := w.b().Instance().Counters()
	if err != nil {
		w.t.Fatal(err)
	}
	return all[r]
}

func (w *world) entries(table string) int {
	for _, t := range w.b().Tables() {
		if t.Name == table {
			return t.Entries
		}
	}
	w.t.Fatalf("no table %s", table)
	return 0
}

func (r result) want(t *testing.T, got string) {
	t.Helper()
	if r.Step != "" || r.Got != got {
		t.Errorf("workload got %q, failing in %q with %v; want %q", r.Got, r.Step, r.Errno, got)
	}
}

func (r result) wantError(t *testing.T, step string, errno syscall.Errno) {
	t.Helper()
	if r.Step != step || r.Errno != errno {
		t.Errorf("workload failed in %q with %v (got %q); want %q with %v", r.Step, r.Errno, r.Got, step, errno)
	}
}

func flowAddr(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

func cgroupID(t *testing.T, dir string) uint64 {
	t.Helper()
	id, err := ebpf.CgroupID(dir)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

type device struct {
	name  string
	index uint32
}

// deviceOf is the host's interface that has the address.
func deviceOf(t *testing.T, w *world, addr string) (d device) {
	t.Helper()
	err := w.host.Do(func() error {
		all, err := net.Interfaces()
		for _, i := range all {
			addrs, _ := i.Addrs()
			for _, a := range addrs {
				if strings.HasPrefix(a.String(), addr+"/") {
					d = device{i.Name, uint32(i.Index)}
				}
			}
		}
		return err
	})
	if err != nil || d.index == 0 {
		t.Fatalf("no interface with %s: %v", addr, err)
	}
	return d
}

// waitCaptured repeats a dial until it reaches the agent: routes are followed, not known in advance.
func waitCaptured(t *testing.T, w *world, j job) {
	t.Helper()
	nettest.Wait(t, "the dial to "+j.To+" to be captured", func() bool { return w.run(j).Got == "agent" })
}

func eventually(t *testing.T, w *world, j job, step string, errno syscall.Errno) {
	t.Helper()
	nettest.Wait(t, fmt.Sprintf("the dial to %s to fail with %v", j.To, errno), func() bool {
		r := w.run(j)
		return r.Step == step && r.Errno == errno
	})
}

var (
	flowZero       netip.AddrPort
	workloadNobody workload.Identity
)
