package nettest

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// CgroupRoot returns where cgroup v2 is mounted: /sys/fs/cgroup, or
// /sys/fs/cgroup/unified on a hybrid layout. It skips the test where no cgroup
// v2 is mounted, or fails it when root tests must run.
func CgroupRoot(t testing.TB) string {
	t.Helper()
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if root, ok := cgroup2Mount(string(info)); ok {
		return root
	}
	if os.Getenv(RootTestsEnv) == "1" {
		t.Fatalf("no cgroup v2 mounted, and %s=1 forbids skipping", RootTestsEnv)
	}
	t.Skip("no cgroup v2 mounted")
	return ""
}

// Cgroup makes a cgroup v2 directory whose name begins with name, below the
// root, and returns its path and its id, which is the directory's inode number.
// At the end of the test what still runs in it is killed and it is removed with
// all that is below.
func Cgroup(t testing.TB, name string) (path string, id uint64) {
	t.Helper()
	RequireRoot(t)
	path = filepath.Join(CgroupRoot(t), unique(name))
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeCgroup(t, path) })
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return path, st.Ino
}

// cgroup2Mount finds the cgroup2 file system's mount point in mountinfo, whose
// fields before " - " are fixed up to the sixth (proc_pid_mountinfo(5)). The
// last mount wins: it lies on top.
func cgroup2Mount(info string) (root string, ok bool) {
	for line := range strings.Lines(info) {
		head, tail, found := strings.Cut(line, " - ")
		fields := strings.Fields(head)
		if found && len(fields) >= 5 && strings.HasPrefix(tail, "cgroup2 ") {
			root, ok = fields[4], true
		}
	}
	return root, ok
}

func removeCgroup(t testing.TB, path string) {
	t.Helper()
	var dirs []string
	_ = filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, dir := range dirs {
		killAll(dir)
		// A cgroup is busy until its last process has been reaped.
		removed := poll(waitLimit, func() bool {
			err := os.Remove(dir)
			return err == nil || os.IsNotExist(err)
		})
		if !removed {
			t.Errorf("waited %v for cgroup %s to become empty", waitLimit, dir)
		}
	}
}

// killAll ends the processes of one cgroup: cgroup.kill is Linux 5.14, before
// that one by one.
func killAll(dir string) {
	if os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) == nil {
		return
	}
	procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	for line := range strings.Lines(string(procs)) {
		var pid int
		if _, err := fmt.Sscan(line, &pid); err == nil && pid > 1 && pid != os.Getpid() {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}
