package ebpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ringfence.dev/bpf"
)

// JoinLeaf makes the cgroup v2 directory name (a path below root is allowed)
// and moves the current process, with all its threads, into it. It returns the
// directory's id, by which the programs know the agent. An empty root
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

// CgroupID returns the id of a cgroup v2 directory as the kernel's hooks know
// it: on 64-bit machines its inode number. On 32-bit ones the id is wider than
// the inode number, with a generation on top, and the file handle carries it.
func CgroupID(dir string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	if uint32(fs.Type) != unix.CGROUP2_SUPER_MAGIC || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, errors.New(dir + " is no cgroup v2 directory")
	}
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir, 0)
	if err == nil && len(handle.Bytes()) == 8 {
		return binary.NativeEndian.Uint64(handle.Bytes()), nil
	}
	return st.Ino, nil
}
