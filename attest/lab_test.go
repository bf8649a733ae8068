package attest

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

// lab is a network namespace and a unit root on the real kernel, with programs
// on a path that only root can write.
type lab struct {
	t    testing.TB
	ns   *nettest.NS
	net  *netns.Handle
	bin  string // directory of programs
	root string // unit root, below the cgroup v2 mount
	dir  string // its directory
}

func newLab(t testing.TB) *lab {
	nettest.RequireRoot(t)
	l := &lab{t: t, ns: nettest.NetNS(t, "rf-attest")}
	var err error
	if l.net, err = netns.Open(l.ns.Path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.net.Close() })
	if l.bin, err = os.MkdirTemp("/run", "rf-attest-"); err == nil {
		err = os.Chmod(l.bin, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(l.bin) })
	l.dir, _ = nettest.Cgroup(t, "rf-attest")
	l.root = strings.TrimPrefix(l.dir, nettest.CgroupRoot(t))
	return l
}

// program makes a program called name out of this test's binary.
func (l *lab) program(name string) string {
	l.t.Helper()
	src, err := os.Open("/proc/self/exe")
	if err != nil {
		l.t.Fatal(err)
	}
	defer src.Close()
	p := filepath.Join(l.bin, name)
	dst, err := os.OpenFile(p, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err == nil {
		_, err = io.Copy(dst, src)
		dst.Close()
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return p
}

// player is a started workload.
type player struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.Closer
	out *bufio.Reader
}

func (p *player) pid() uint32 { return uint32(p.cmd.Process.Pid) }

// line reads one line of what it says.
func (p *player) line() string {
	p.t.Helper()
	s, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("%s: %q, %v", p.cmd.Path, s, err)
	}
	return strings.TrimSpace(s)
}

func (p *player) stop() {
	p.in.Close()
	p.cmd.Wait()
}

// start starts a program in the namespace, in a unit of the root if one is
// named. files become descriptors 3 and on.
func (l *lab) start(unit, path string, files []*os.File, args ...string) *player {
	l.t.Helper()
	cmd := exec.Command(path, args...)
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if unit != "" {
		dir := filepath.Join(l.dir, unit)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			l.t.Fatal(err)
		}
		fd, err := os.Open(dir)
		if err != nil {
			l.t.Fatal(err)
		}
		defer fd.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(fd.Fd())
	}
	p := &player{t: l.t, cmd: cmd}
	in, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	p.in, p.out = in, bufio.NewReader(out)
	if err := l.ns.Do(cmd.Start); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { cmd.Process.Kill(); p.stop() })
	return p
}

// ready starts and waits until the program says that it is.
func (l *lab) ready(unit, path string, files []*os.File, args ...string) *player {
	l.t.Helper()
	p := l.start(unit, path, files, args...)
	if got := p.line(); got != "ready" {
		l.t.Fatalf("%s says %q", path, got)
	}
	return p
}

func (l *lab) attestor(edit func(*Config)) *Attestor {
	l.t.Helper()
	cfg := Config{TrustDomain: testDomain, Host: "a", UnitRoots: []string{l.root}, UnitDirs: []string{filepath.Join(l.bin, "units")}}
	if edit != nil {
		edit(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { a.Close() })
	return a
}
