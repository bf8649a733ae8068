package nettest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// result records how a test ended, through a TB whose Fatalf and Skip do not end the real one.
type result struct {
	testing.TB
	failed, skipped bool
}

func (r *result) Helper()               {}
func (r *result) Fatalf(string, ...any) { r.failed = true; panic(r) }
func (r *result) Skip(...any)           { r.skipped = true; panic(r) }

func outcome(t *testing.T, fn func(testing.TB)) (r *result) {
	r = &result{TB: t}
	defer func() {
		if v := recover(); v != nil && v != r {
			panic(v)
		}
	}()
	fn(r)
	return r
}

func TestWaitSaysWhat(t *testing.T) {
	n := 0
	Wait(t, "three polls", func() bool { n++; return n == 3 })
	r := &result{TB: t}
	func() {
		defer func() { _ = recover() }()
		WaitFor(r, 10*time.Millisecond, "never", func() bool { return false })
	}()
	if !r.failed {
		t.Error("a condition that never holds did not fail the test")
	}
}

func TestRequireRoot(t *testing.T) {
	for _, c := range []struct {
		euid            int
		env             string
		failed, skipped bool
	}{
		{euid: 0},
		{euid: 0, env: "1"},
		{euid: 1000, skipped: true},
		{euid: 1000, env: "0", skipped: true},
		{euid: 1000, env: "1", failed: true},
	} {
		t.Setenv(RootTestsEnv, c.env)
		r := outcome(t, func(t testing.TB) { requireRoot(t, c.euid) })
		if r.failed != c.failed || r.skipped != c.skipped {
			t.Errorf("euid %d, %s=%q: failed %v, skipped %v", c.euid, RootTestsEnv, c.env, r.failed, r.skipped)
		}
	}
}

func TestCgroup2Mount(t *testing.T) {
	const hybrid = `30 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,name=systemd
`
	const pure = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
	for info, want := range map[string]string{hybrid: "/sys/fs/cgroup/unified", pure: "/sys/fs/cgroup", "x - cgroup2": ""} {
		if got, _ := cgroup2Mount(info); got != want {
			t.Errorf("got %q, want %q from\n%s", got, want, info)
		}
	}
}

func TestNamespacesTalkOverVeth(t *testing.T) {
	a, b := NetNS(t, "rfnt-a"), NetNS(t, "rfnt-b")
	VethPair(t, a, b, "192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "2001:db8::2/64")
	for _, addr := range []string{"192.0.2.2:0", "[2001:db8::2]:0"} {
		l := b.Listen(t, addr)
		var c net.Conn
		err := a.Do(func() (err error) {
			c, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
			return err
		})
		if err != nil {
			t.Fatalf("dial %s: %v", l.Addr(), err)
		}
		c.Close()
	}
	if out := a.Exec(t, "cat", "/proc/net/dev"); !strings.Contains(out, "lo:") || strings.Contains(out, "eth0:") {
		t.Errorf("not inside the namespace:\n%s", out)
	}
}

func TestLoopbackIsUp(t *testing.T) {
	ns := NetNS(t, "rfnt-lo")
	l := ns.Listen(t, "127.0.0.1:0")
	err := ns.Do(func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestNamespaceIsRemoved(t *testing.T) {
	RequireRoot(t)
	var path string
	t.Run("scratch", func(t *testing.T) { path = NetNS(t, "rfnt-gone").Path })
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

func TestCgroupIsRemovedWithItsProcesses(t *testing.T) {
	RequireRoot(t)
	var path string
	var cmd *exec.Cmd
	t.Run("scratch", func(t *testing.T) {
		var id uint64
		path, id = Cgroup(t, "rfnt")
		if id == 0 {
			t.Error("no id")
		}
		child := filepath.Join(path, "child")
		if err := os.Mkdir(child, 0o755); err != nil {
			t.Fatal(err)
		}
		dir, err := os.Open(child)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		cmd = exec.Command("sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { _ = cmd.Wait() }()
	})
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", path, err)
	}
}
