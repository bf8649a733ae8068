package faults_test

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/bpf"
	"ringfence.dev/test/nettest"
)

// site is a host (192.0.2.1, 2001:db8::1) whose namespace an agent may take as a
// scope, and a stranger (.2) without one.
type site struct {
	t        testing.TB
	name     string // of its scope
	host     *nettest.NS
	stranger *nettest.NS
	dev      string // the host's device
}

func newSite(t testing.TB) *site {
	t.Helper()
	w := &site{t: t, host: nettest.NetNS(t, "rff-a"), stranger: nettest.NetNS(t, "rff-b")}
	w.name = w.host.Name
	w.dev, _ = nettest.VethPair(t, w.host, w.stranger, "192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "2001:db8::2/64")
	return w
}

// in is a site with a scope in a running agent, added by the command.
func (w *site) in(a *agentProc, mode string, flags ...string) *site {
	w.t.Helper()
	a.in(w.t).must(append([]string{"scope", "add", w.name, "--netns", w.host.Path, "--mode", mode}, flags...)...)
	w.t.Cleanup(func() {
		if out, code := a.in(w.t).command("scope", "remove", w.name); code != 0 && !strings.Contains(out, "not found") {
			w.t.Errorf("scope remove: %s", out)
		}
	})
	return w
}

// on is the site in the hands of a subtest.
func (w *site) on(t testing.TB) *site {
	sub := *w
	sub.t = t
	return &sub
}

// unitDir makes the cgroup of a unit, which lives as long as the tests.
func unitDir(t testing.TB, unit string) string {
	t.Helper()
	root, err := bpf.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, unitRoot, unit+".service")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func removeUnits() {
	root, err := bpf.CgroupRoot()
	if err != nil {
		return
	}
	var dirs []string
	_ = filepath.WalkDir(filepath.Join(root, unitRoot), func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, d := range dirs {
		if err := os.Remove(d); err != nil {
			fmt.Fprintln(os.Stderr, "left behind:", err)
		}
	}
}

// proc is a running workload.
type proc struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

// launch starts a job as a unit of a namespace. It is killed at the end of the test.
func launch(t testing.TB, ns *nettest.NS, unit string, j job, files ...*os.File) *proc {
	t.Helper()
	return launchAs(t, ns, unitDir(t, unit), "/proc/self/exe", j, files...)
}

// launchAs is launch with a cgroup directory and a program file to choose.
func launchAs(t testing.TB, ns *nettest.NS, cgroup, exe string, j job, files ...*os.File) *proc {
	t.Helper()
	spec, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	p := &proc{t: t, cmd: exec.Command(exe)}
	// Calls with a time-out are not restarted after a signal, and the runtime preempts by signals.
	p.cmd.Env = append(os.Environ(), jobEnv+"="+string(spec), "GODEBUG=asyncpreemptoff=1")
	p.cmd.Stderr, p.cmd.ExtraFiles = os.Stderr, files
	p.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	p.out = json.NewDecoder(out)
	if err := ns.Do(p.cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.end)
	return p
}

// end kills the workload and reaps it.
func (p *proc) end() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// ended reports whether the process is dead.
func (p *proc) ended() bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

// next is the workload's next report.
func (p *proc) next() (r result) {
	p.t.Helper()
	timer := time.AfterFunc(jobLimit, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	if err := p.out.Decode(&r); err != nil {
		p.t.Fatalf("workload: no report within %v: %v", jobLimit, err)
	}
	return r
}

// goOn lets a workload that pauses or holds do the rest, and returns its last report.
func (p *proc) goOn() result {
	p.t.Helper()
	if _, err := io.WriteString(p.in, "\n"); err != nil {
		p.t.Fatal(err)
	}
	return p.next()
}

// run runs a dialling job to its end.
func (w *site) run(unit string, j job, files ...*os.File) result {
	w.t.Helper()
	p := launch(w.t, w.host, unit, j, files...)
	defer p.end()
	return p.next()
}

// serve runs a server as a unit of the host.
func (w *site) serve(unit, addr string) *proc {
	w.t.Helper()
	p := launch(w.t, w.host, unit, job{Serve: addr})
	if r := p.next(); r.Step != "" {
		w.t.Fatalf("server %s on %s: %v", unit, addr, r)
	}
	return p
}

// far is a server in the stranger's namespace, which counts who reached it.
type far struct {
	mu   sync.Mutex
	seen []string // addresses of clients
}

// listen starts a server on the stranger's side that says "app" and then reads to the end.
func (w *site) listen(addr string) *far {
	w.t.Helper()
	f := &far{}
	l := w.stranger.Listen(w.t, addr)
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.seen = append(f.seen, c.RemoteAddr().String())
			f.mu.Unlock()
			all.Go(func() {
				stop := time.AfterFunc(time.Minute, func() { c.Close() })
				defer stop.Stop()
				_, _ = c.Write([]byte("app"))
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			})
		}
	})
	// Registered after the listener's own cleanup, so it runs before; connections end with their clients.
	w.t.Cleanup(func() { l.Close() })
	return f
}

// clients are those who reached the server since the last call.
func (f *far) clients() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	seen := f.seen
	f.seen = nil
	return seen
}

// ask dials from the stranger's namespace and returns what came first, or the error.
func (w *site) ask(addr string) (got string, err error) {
	err = w.stranger.Do(func() error {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		got = string(buf[:n])
		return err
	})
	return got, err
}

// passes fails the test unless the job reached the far server.
func (w *site) passes(unit string, j job, f *far) result {
	w.t.Helper()
	r := w.run(unit, j)
	if r.Step != "" || r.Got != "app" {
		w.t.Errorf("%s %+v: %v; want it to pass", unit, j, r)
	}
	if n := len(f.clients()); n != 1 {
		w.t.Errorf("%s %+v: %d connections reached the server, want 1", unit, j, n)
	}
	return r
}

// isRefused fails the test if the job got anything, or reached the far server.
func (w *site) isRefused(unit string, j job, f *far, files ...*os.File) result {
	w.t.Helper()
	r := w.run(unit, j, files...)
	if r.Step == "" || r.Got != "" {
		w.t.Errorf("%s %+v: %v; want it refused", unit, j, r)
	}
	if c := f.clients(); len(c) != 0 {
		w.t.Errorf("%s %+v reached the server from %v", unit, j, c)
	}
	return r
}

// held are the descriptors of a process that are connected sockets or anything else open.
func descriptors(t testing.TB, pid int) int {
	t.Helper()
	dir, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(dir)
}

// socketIn opens a TCP socket in a namespace from here, as somebody outside of all units would.
func socketIn(t testing.TB, ns *nettest.NS) *os.File {
	t.Helper()
	fd := -1
	err := ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "socket")
	t.Cleanup(func() { f.Close() })
	return f
}
