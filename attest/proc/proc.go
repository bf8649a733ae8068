// Package proc reads process images from a /proc tree: when a process
// started, as whom it runs, which file it executes, which cgroup it is in, and
// which processes hold a socket open. It judges nothing; package attest does.
//
// The invariant: everything said about one process is read through one open
// /proc/PID directory. That directory belongs to the kernel's struct pid, not to
// the number, so once the process is reaped every read fails with ESRCH, whoever
// has the number by then. A pidfd pins the same object and would add nothing but
// a descriptor; unlike a pidfd, the directory also works for a /proc that is
// mounted somewhere else. What the directory does not pin is the image: execve
// keeps the pid and the start time, so [FS.Read] looks at the executable before
// and after.
package proc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/workload"
)

// Inode numbers of the initial namespaces, include/linux/proc_ns.h.
const (
	initPIDNamespace    = 0xEFFFFFFC
	initCgroupNamespace = 0xEFFFFFFB
)

// maxFile bounds what is read of one /proc file. The longest are status and
// cgroup: 64 Ki supplementary groups and a dozen paths of at most 4 KiB.
const maxFile = 1 << 20

// FS is a /proc tree. It is safe for concurrent use.
type FS struct {
	root string
	// between is called by tests between the reads of one image.
	between func(step string)
}

// New returns the tree at root, usually "/proc"; empty means that.
func New(root string) *FS {
	if root == "" {
		root = "/proc"
	}
	return &FS{root: filepath.Clean(root), between: func(string) {}}
}

// Initial reports whether this process sees pids and cgroups as the host does:
// hooks give pids of the initial pid namespace and cgroup ids of the whole
// hierarchy, so elsewhere their evidence cannot be looked up.
func (f *FS) Initial() (pid, cgroup bool) {
	pidNS, err1 := namespace(unix.AT_FDCWD, filepath.Join(f.root, "self/ns/pid"))
	cgroupNS, err2 := namespace(unix.AT_FDCWD, filepath.Join(f.root, "self/ns/cgroup"))
	return err1 == nil && pidNS == initPIDNamespace, err2 == nil && cgroupNS == initCgroupNamespace
}

// Self is our own pid in this tree, which differs from os.Getpid when the tree
// was mounted in another pid namespace.
func (f *FS) Self() (uint32, error) {
	link, err := readlink(unix.AT_FDCWD, filepath.Join(f.root, "self"))
	if err != nil {
		return 0, fmt.Errorf("own process: %w", err)
	}
	pid, err := strconv.ParseUint(link, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("own process: %w", err)
	}
	return uint32(pid), nil
}

// Handle is one process, pinned until Close. It is not safe for concurrent use.
type Handle struct {
	pid uint32
	dir int
}

// Open pins a process by pid. It returns [workload.ErrGone] when there is none.
func (f *FS) Open(pid uint32) (*Handle, error) {
	if pid == 0 {
		return nil, fmt.Errorf("process 0: %w", workload.ErrGone)
	}
	dir, err := unix.Open(f.root+"/"+strconv.FormatUint(uint64(pid), 10), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, failed(pid, "open", err)
	}
	return &Handle{pid: pid, dir: dir}, nil
}

// Close lets go of the process. It may be called twice.
func (h *Handle) Close() {
	if h.dir >= 0 {
		unix.Close(h.dir)
		h.dir = -1
	}
}

// failed says what failed about which process, and turns the kernel's ways of
// saying that it has ended into ErrGone.
func failed(pid uint32, what string, err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("process %d: %s: %w", pid, what, workload.ErrGone)
	}
	return fmt.Errorf("process %d: %s: %w", pid, what, err)
}

func (h *Handle) read(name string) ([]byte, error) {
	fd, err := unix.Openat(h.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, failed(h.pid, name, err)
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 1024)
	for {
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, failed(h.pid, name, err)
		}
		if n == 0 {
			return buf, nil
		}
		if buf = buf[:len(buf)+n]; len(buf) > maxFile {
			return nil, fmt.Errorf("process %d: %s is longer than %d bytes", h.pid, name, maxFile)
		}
		if len(buf) == cap(buf) {
			buf = append(buf, make([]byte, len(buf))...)[:len(buf)]
		}
	}
}

// Stat reads the process's stat file.
func (h *Handle) Stat() (Stat, error) {
	text, err := h.read("stat")
	if err != nil {
		return Stat{}, err
	}
	st, err := parseStat(text)
	if err != nil {
		return Stat{}, fmt.Errorf("process %d: %w", h.pid, err)
	}
	if st.PID != h.pid {
		return Stat{}, fmt.Errorf("process %d: stat speaks of process %d", h.pid, st.PID)
	}
	if st.State == 'X' || st.State == 'x' {
		return Stat{}, fmt.Errorf("process %d: dead: %w", h.pid, workload.ErrGone)
	}
	return st, nil
}

// Status reads user and group ids, as the reader's user namespace sees them.
func (h *Handle) Status() (Status, error) {
	text, err := h.read("status")
	if err != nil {
		return Status{}, err
	}
	st, err := parseStatus(text)
	if err != nil {
		return Status{}, fmt.Errorf("process %d: %w", h.pid, err)
	}
	return st, nil
}

// Cgroups reads the process's cgroup paths, relative to the reader's cgroup namespace.
func (h *Handle) Cgroups() (Cgroups, error) {
	text, err := h.read("cgroup")
	if err != nil {
		return Cgroups{}, err
	}
	cg, err := parseCgroups(text)
	if err != nil {
		return Cgroups{}, fmt.Errorf("process %d: %w", h.pid, err)
	}
	return cg, nil
}

// Namespace is the inode number of one of the process's namespaces, such as "mnt" or "pid".
func (h *Handle) Namespace(kind string) (uint64, error) {
	ino, err := namespace(h.dir, "ns/"+kind)
	if err != nil {
		return 0, failed(h.pid, "namespace "+kind, err)
	}
	return ino, nil
}

// namespace reads a link such as "mnt:[4026531841]".
func namespace(dir int, path string) (uint64, error) {
	link, err := readlink(dir, path)
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(link, ":[")
	num, end := strings.CutSuffix(rest, "]")
	if !ok || !end {
		return 0, fmt.Errorf("namespace link %q is malformed", link)
	}
	return strconv.ParseUint(num, 10, 64)
}

// readlink reads a link of any length; nearly all are short.
func readlink(dir int, path string) (string, error) {
	for buf := make([]byte, 256); ; buf = make([]byte, 4*len(buf)) {
		n, err := unix.Readlinkat(dir, path, buf)
		if err != nil {
			return "", err
		}
		if n < len(buf) {
			return string(buf[:n]), nil
		}
	}
}

// OpenExe opens the executed file itself, whatever its path names by now.
func (h *Handle) OpenExe() (*os.File, error) {
	fd, err := unix.Openat(h.dir, "exe", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, failed(h.pid, "open executable", err)
	}
	return os.NewFile(uintptr(fd), "exe of "+strconv.FormatUint(uint64(h.pid), 10)), nil
}
