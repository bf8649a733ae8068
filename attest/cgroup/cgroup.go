// Package cgroup finds the cgroup v2 hierarchy of a host, translates between
// cgroup ids and paths, and reads systemd units out of paths, for hosts on
// cgroup v2, v1 and systemd's hybrid of the two.
//
// The invariant: a path says who runs in it only as far as its owner goes. See
// [UnitOf] for which part of a path was written by PID 1.
package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotFound reports a cgroup id or path that does not exist (any more), or
// lies outside of what this mount shows.
var ErrNotFound = errors.New("cgroup: no such cgroup")

// fileIDKernfs is FILEID_KERNFS, include/linux/exportfs.h (Linux 5.5): the
// handle of a cgroup directory is its 64-bit id.
const fileIDKernfs = 0xfe

// maxWalk bounds the directories looked at where handles cannot be used.
const maxWalk = 100_000

// Config says where the hierarchy is. The zero value is right on a host.
type Config struct {
	// Mount is where cgroup v2 is mounted; empty means the place found by [Mount].
	Mount string
	// UnitRoots are paths below the v2 root whose direct children called
	// NAME.service count as units, besides systemd's own. None by default.
	UnitRoots []string
}

// Tree is a mounted cgroup v2 hierarchy. It is safe for concurrent use.
type Tree struct {
	mount string // without symbolic links
	roots []string
}

// Open finds and checks the hierarchy.
func Open(cfg Config) (*Tree, error) {
	roots := make([]string, 0, len(cfg.UnitRoots))
	for _, r := range cfg.UnitRoots {
		if !path.IsAbs(r) || path.Clean(r) != r || r == "/" {
			return nil, fmt.Errorf("unit root %q: not an absolute, clean cgroup path below the root", r)
		}
		roots = append(roots, r)
	}
	mount := cfg.Mount
	if mount == "" {
		var err error
		if mount, err = Mount("/"); err != nil {
			return nil, err
		}
	}
	mount, err := filepath.EvalSymlinks(mount)
	if err != nil {
		return nil, fmt.Errorf("cgroup v2 mount: %w", err)
	}
	return &Tree{mount: mount, roots: roots}, nil
}

// Mount returns where cgroup v2 is mounted below root ("/" on a host): the
// place of systemd's hybrid layout, else that of the unified one, else whatever
// the mount table says.
func Mount(root string) (string, error) {
	for _, p := range []string{"sys/fs/cgroup/unified", "sys/fs/cgroup"} {
		p = filepath.Join(root, p)
		var st unix.Statfs_t
		if unix.Statfs(p, &st) == nil && int64(st.Type) == unix.CGROUP2_SUPER_MAGIC {
			return p, nil
		}
	}
	text, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return "", fmt.Errorf("find cgroup v2: %w", err)
	}
	if p, ok := mountPoint(string(text)); ok {
		return filepath.Join(root, p), nil
	}
	return "", fmt.Errorf("%w: cgroup v2 is not mounted", ErrNotFound)
}

// mountPoint looks for a cgroup2 mount of the whole hierarchy, proc_pid_mountinfo(5).
func mountPoint(mountinfo string) (string, bool) {
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if !ok || len(fields) < 6 || !strings.HasPrefix(after, "cgroup2 ") || fields[3] != "/" {
			continue
		}
		return unescape(fields[4]), true
	}
	return "", false
}

// unescape undoes the octal escapes that mountinfo uses for space, tab, newline and backslash.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Root is where the hierarchy is mounted.
func (t *Tree) Root() string { return t.mount }

// Unit finds the systemd unit of a path below the v2 root. See [UnitOf].
func (t *Tree) Unit(p string) Unit { return UnitOf(p, t.roots) }

// Rooted reports whether a path lies below one of the configured unit roots.
func (t *Tree) Rooted(p string) bool {
	for _, r := range t.roots {
		if strings.HasPrefix(p, r+"/") {
			return true
		}
	}
	return false
}

// HasUnit reports whether a cgroup NAME directly below a unit root exists.
func (t *Tree) HasUnit(name string) bool {
	for _, r := range t.roots {
		if _, err := os.Lstat(filepath.Join(t.mount, r, name)); err == nil {
			return true
		}
	}
	return false
}

// dir is the directory of a cgroup path, which must not climb out.
func (t *Tree) dir(p string) (string, error) {
	if !path.IsAbs(p) || path.Clean(p) != p {
		return "", fmt.Errorf("cgroup %q: %w", p, ErrNotFound)
	}
	return filepath.Join(t.mount, p), nil
}

// ID is the id that the kernel gives to the cgroup at a path: what
// bpf_get_current_cgroup_id and INET_DIAG_CGROUP_ID tell. On 64-bit kernels it
// is the directory's inode number and is never used twice.
func (t *Tree) ID(p string) (uint64, error) {
	dir, err := t.dir(p)
	if err != nil {
		return 0, err
	}
	if h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir, 0); err == nil && h.Type() == fileIDKernfs && h.Size() == 8 {
		return binary.NativeEndian.Uint64(h.Bytes()), nil
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			err = ErrNotFound
		}
		return 0, fmt.Errorf("cgroup %s: %w", p, err)
	}
	return uint64(st.Ino), nil
}

// Path is the path below the v2 root of the cgroup with an id. A cgroup that
// was removed is [ErrNotFound].
func (t *Tree) Path(id uint64) (string, error) {
	p, err := t.byHandle(id)
	if err != nil && !errors.Is(err, ErrNotFound) {
		p, err = t.byWalk(id)
	}
	if err != nil {
		return "", err
	}
	// Also catches a directory that is not below our mount, for which the
	// kernel makes up a path, and one removed meanwhile.
	if got, err := t.ID(p); err != nil || got != id {
		return "", fmt.Errorf("cgroup id %d: %w", id, ErrNotFound)
	}
	return p, nil
}

// byHandle asks the kernel: open_by_handle_at(2), CAP_DAC_READ_SEARCH.
func (t *Tree) byHandle(id uint64) (string, error) {
	mfd, err := unix.Open(t.mount, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("cgroup v2 mount: %w", err)
	}
	defer unix.Close(mfd)
	h := unix.NewFileHandle(fileIDKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(mfd, h, unix.O_PATH|unix.O_CLOEXEC)
	if errors.Is(err, unix.ESTALE) && t.kernfs(mfd) {
		// The kernel knows: without this, every connection from a removed
		// cgroup would walk the whole tree.
		return "", fmt.Errorf("cgroup id %d: %w", id, ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("cgroup id %d: %w", id, err)
	}
	defer unix.Close(fd)
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", fmt.Errorf("cgroup id %d: %w", id, err)
	}
	return t.below(link)
}

func (t *Tree) kernfs(mfd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(mfd, &st) == nil && int64(st.Type) == unix.CGROUP2_SUPER_MAGIC
}

func (t *Tree) below(dir string) (string, error) {
	rest, ok := strings.CutPrefix(dir, strings.TrimSuffix(t.mount, "/"))
	switch {
	case ok && rest == "":
		return "/", nil
	case ok && rest[0] == '/':
		return rest, nil
	}
	return "", fmt.Errorf("cgroup directory %s: %w", dir, ErrNotFound)
}

// byWalk looks at every directory, for kernels before 5.5 and for agents
// without CAP_DAC_READ_SEARCH.
func (t *Tree) byWalk(id uint64) (string, error) {
	found, seen := "", 0
	err := filepath.WalkDir(t.mount, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // removed while we walk, or a control file
		}
		if seen++; seen > maxWalk {
			return fmt.Errorf("cgroup id %d: not among the first %d cgroups", id, maxWalk)
		}
		var st unix.Stat_t
		if unix.Lstat(p, &st) == nil && uint64(st.Ino) == id {
			found = p
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if found == "" {
		return "", fmt.Errorf("cgroup id %d: %w", id, ErrNotFound)
	}
	return t.below(found)
}

// Processes lists the processes directly in the cgroup at a path.
func (t *Tree) Processes(p string) ([]uint32, error) {
	dir, err := t.dir(p)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", p, err)
	}
	var pids []uint32
	for _, f := range strings.Fields(string(text)) {
		// 0 stands for a process outside of our pid namespace.
		if n, err := strconv.ParseUint(f, 10, 32); err == nil && n != 0 {
			pids = append(pids, uint32(n))
		}
	}
	return pids, nil
}
