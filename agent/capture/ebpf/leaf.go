package ebpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"ringfence.dev/bpf"
)

// JoinLeaf makes the cgroup v2 directory name (a path below root is allowed)
// and moves the current process, with all its threads, into it. It returns the
// directory's inode number, by which the programs know the agent. An empty root
// means the mount point of the cgroup v2 tree.
//
// Moving leaves the resource limits of the service manager behind where they
// sit on the old directory, so an agent under systemd takes a leaf below its
// own delegated unit.
func JoinLeaf(root, name string) (cgroupID uint64, err error) {
	if root == "" {
		if root, err = bpf.CgroupRoot(); err != nil {
			return 0, err
		}
	}
	dir := filepath.Join(root, name)
	if rel, err := filepath.Rel(root, dir); err != nil || rel == "." || strings.HasPrefix(rel, "..") {
		return 0, fmt.Errorf("cgroup leaf %q is not below %s", name, root)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, fmt.Errorf("make cgroup leaf: %w", err)
	}
	pid := strconv.Itoa(os.Getpid())
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(pid), 0o644); err != nil {
		return 0, fmt.Errorf("join cgroup leaf %s: %w", dir, err)
	}
	return CgroupID(dir)
}

// CgroupID returns the inode number of a cgroup v2 directory, which is its id
// in the kernel. On 32-bit machines that is the low half of the id.
func CgroupID(dir string) (uint64, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return 0, err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || !st.IsDir() {
		return 0, errors.New(dir + " is no cgroup directory")
	}
	return sys.Ino, nil
}
