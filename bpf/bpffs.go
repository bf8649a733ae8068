package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	bpffs = "/sys/fs/bpf"
	// DefaultPinRoot is where instances pin unless told otherwise.
	DefaultPinRoot = bpffs + "/ringfence"
)

// CgroupRoot returns the mount point of the whole cgroup v2 tree: usually
// /sys/fs/cgroup, on hybrid hosts /sys/fs/cgroup/unified. A mount of a subtree,
// as inside a container, does not count.
func CgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if at, ok := cgroup2Mount(lines.Text()); ok {
			return at, nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", err
	}
	return "", errors.New("bpf: no cgroup v2 tree is mounted with its root")
}

// cgroup2Mount reads one line of mountinfo, proc_pid_mountinfo(5): fields before
// " - " are positional, the file system type is the first after it.
func cgroup2Mount(line string) (at string, ok bool) {
	before, after, found := strings.Cut(line, " - ")
	fields := strings.Fields(before)
	if !found || len(fields) < 5 || !strings.HasPrefix(after, "cgroup2 ") || fields[3] != "/" {
		return "", false
	}
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`).Replace(fields[4]), true
}

// makePinRoot makes the directory that holds the instances, mounting bpffs at
// its usual place when nothing is there.
func makePinRoot(root string) error {
	if strings.HasPrefix(root, bpffs) && !isBPFFS(bpffs) {
		if err := unix.Mount("bpf", bpffs, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("mount bpffs at %s: %w", bpffs, err)
		}
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	if !isBPFFS(root) {
		return fmt.Errorf("pin directory %s is not on a bpf file system", root)
	}
	return nil
}

func isBPFFS(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && uint32(st.Type) == unix.BPF_FS_MAGIC
}

// checkInstance refuses names that bpffs would (dots) or that would leave the pin root.
func checkInstance(name string) error {
	if name == "" || len(name) > 63 {
		return fmt.Errorf("instance name %q is not 1 to 63 characters long", name)
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return fmt.Errorf("instance name %q: only a-z, 0-9, - and _ are allowed", name)
		}
	}
	return nil
}

// sweep removes what an agent left that died while it published for the first time.
func sweep(root, instance string) {
	left, _ := filepath.Glob(filepath.Join(root, instance+"~*"))
	for _, dir := range left {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), instance+"~%d", &pid); err != nil {
			continue
		}
		if pid != os.Getpid() && unix.Kill(pid, 0) == unix.ESRCH {
			_ = removePins(dir)
		}
	}
}
