package proc

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"ringfence.dev/attest/workload"
	"ringfence.dev/test/nettest"
)

// fake writes one process into a made-up /proc.
func fake(t *testing.T, root string, pid int, start, exe string) {
	t.Helper()
	dir := filepath.Join(root, strconv.Itoa(pid))
	files := map[string]string{
		"stat":   strings.Replace(strings.Replace(stat1("x"), "812", strconv.Itoa(pid), 1), "4211", start, 1),
		"status": "Name:\tx\nUid:\t1\t2\t2\t2\nGid:\t3\t4\t4\t4\nGroups:\t5\n",
		"cgroup": "0::/system.slice/x.service\n",
	}
	if err := os.MkdirAll(filepath.Join(dir, "ns"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{"exe": exe, "ns/mnt": "mnt:[4026531841]", "ns/pid": "pid:[4026531836]"} {
		os.Remove(filepath.Join(dir, name))
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

func program(t *testing.T, name string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, []byte("#!"+name), 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestReadFake(t *testing.T) {
	root, exe := t.TempDir(), program(t, "x")
	fake(t, root, 7, "100", exe)
	img, err := New(root).Read(7)
	if err != nil {
		t.Fatal(err)
	}
	if img.PID != 7 || img.StartTime != 1_000_000_000 || img.EUID != 2 || img.EGID != 4 || img.Exe.Path != exe ||
		img.Exe.Deleted || img.Cgroups.V2 != "/system.slice/x.service" || img.MountNS != 4026531841 || img.PIDNS != 4026531836 {
		t.Errorf("image %+v", img)
	}
}

// What happens to a process while it is read must not mix two images into one.
func TestReadNeverMixesImages(t *testing.T) {
	first, second := program(t, "first"), program(t, "second")
	changes := map[string]func(t *testing.T, root string){
		"execve": func(t *testing.T, root string) { fake(t, root, 7, "100", second) },
		"exit":   func(t *testing.T, root string) { os.RemoveAll(filepath.Join(root, "7")) },
		"start time changes": func(t *testing.T, root string) {
			fake(t, root, 7, "200", first)
		},
	}
	for what, change := range changes {
		for _, step := range []string{"stat", "exe", "rest"} {
			t.Run(what+" after "+step, func(t *testing.T) {
				root := t.TempDir()
				fake(t, root, 7, "100", first)
				fs := New(root)
				fs.between = func(s string) {
					if s == step {
						change(t, root)
					}
				}
				img, err := fs.Read(7)
				if err == nil && what == "execve" && step == "stat" && img.Exe.Path == second {
					return // before the first look at the executable: one image, the second
				}
				if !errors.Is(err, workload.ErrGone) {
					t.Errorf("read %+v (%v), want ErrGone", img.Exe, err)
				}
			})
		}
	}
}

// A pid that gets another owner between two reads does not leak into the first
// one's image: the handle goes on showing the first, as the kernel's does.
func TestHandleOutlivesSwap(t *testing.T) {
	root, exe := t.TempDir(), program(t, "x")
	fake(t, root, 7, "100", exe)
	fs := New(root)
	h, err := fs.Open(7)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := os.Rename(filepath.Join(root, "7"), filepath.Join(root, "old")); err != nil {
		t.Fatal(err)
	}
	fake(t, root, 7, "900", program(t, "other"))
	if img, err := fs.ReadHandle(h); err != nil || img.Exe.Path != exe || img.StartTime != 1_000_000_000 {
		t.Errorf("handle shows %s started at %d (%v)", img.Exe.Path, img.StartTime, err)
	}
}

func TestOpenNobody(t *testing.T) {
	for _, pid := range []uint32{0, 1 << 31} {
		if _, err := New("").Read(pid); !errors.Is(err, workload.ErrGone) {
			t.Errorf("pid %d: %v", pid, err)
		}
	}
}

// sleeper starts a process that waits until the test ends.
func sleeper(t *testing.T, path string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(path, args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func waitExe(t *testing.T, pid int, path string) {
	t.Helper()
	nettest.Wait(t, "process "+strconv.Itoa(pid)+" to execute "+path, func() bool {
		link, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
		return link == path
	})
}

func TestDeletedExecutable(t *testing.T) {
	for _, name := range []string{"prog", "prog (deleted)"} {
		path := filepath.Join(t.TempDir(), name)
		copyFile(t, "/bin/cat", path)
		cmd := sleeper(t, path)
		waitExe(t, cmd.Process.Pid, path)
		pid := uint32(cmd.Process.Pid)
		if img, err := New("").Read(pid); err != nil || img.Exe.Path != path || img.Exe.Deleted {
			t.Errorf("%s: path %q, deleted %v (%v)", name, img.Exe.Path, img.Exe.Deleted, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if img, err := New("").Read(pid); err != nil || img.Exe.Path != path || !img.Exe.Deleted {
			t.Errorf("%s after removal: path %q, deleted %v (%v)", name, img.Exe.Path, img.Exe.Deleted, err)
		}
		copyFile(t, "/bin/ls", path) // another file of that name is not it
		if img, err := New("").Read(pid); err != nil || !img.Exe.Deleted {
			t.Errorf("%s after replacement: deleted %v (%v)", name, img.Exe.Deleted, err)
		}
	}
}

func TestZombieAndReapedAreGone(t *testing.T) {
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := uint32(cmd.Process.Pid)
	h, err := New("").Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	nettest.Wait(t, "a zombie", func() bool {
		st, err := h.Stat()
		return err == nil && st.State == 'Z'
	})
	if img, err := New("").Read(pid); !errors.Is(err, workload.ErrGone) {
		t.Errorf("zombie read as %+v (%v)", img, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Stat(); !errors.Is(err, workload.ErrGone) {
		t.Errorf("handle after the end: %v", err)
	}
}

func TestKernelThreadHasNoImage(t *testing.T) {
	fs := New("")
	pids, err := fs.PIDs()
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		h, err := fs.Open(pid)
		if err != nil {
			continue
		}
		st, err := h.Stat()
		h.Close()
		if err != nil || !st.Kernel {
			continue
		}
		if img, err := fs.Read(pid); err == nil {
			t.Errorf("kernel thread %s read as %+v", st.Comm, img)
		}
		return
	}
	t.Log("this pid namespace shows no kernel threads")
}

func BenchmarkRead(b *testing.B) {
	fs, pid := New(""), uint32(os.Getpid())
	b.ReportAllocs()
	for b.Loop() {
		if _, err := fs.Read(pid); err != nil {
			b.Fatal(err)
		}
	}
}

func TestLongExecutablePath(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, strings.Repeat("d", 200), strings.Repeat("e", 200))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, strings.Repeat("x", 250))
	if err := os.WriteFile(path, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	fake(t, root, 7, "100", path)
	if img, err := New(root).Read(7); err != nil || img.Exe.Path != path {
		t.Errorf("path %q (%v)", img.Exe.Path, err)
	}
}
