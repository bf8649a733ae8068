package proc

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/workload"
)

// deletedSuffix is what the kernel appends to the path of an unlinked file
// (d_path, fs/d_path.c). A file may also really be called so.
const deletedSuffix = " (deleted)"

// FileID tells one version of one file from any other: inode numbers are
// reused, and ctime cannot be set back by the file's owner.
type FileID struct {
	Dev, Inode   uint64
	Size         int64
	MTime, CTime int64 // nanoseconds since 1970
}

func fileID(st *unix.Stat_t) FileID {
	return FileID{
		Dev: uint64(st.Dev), Inode: uint64(st.Ino), Size: st.Size,
		MTime: st.Mtim.Nano(), CTime: st.Ctim.Nano(),
	}
}

// Exe is the file that a process executes.
type Exe struct {
	// Path is as the kernel gives it, without " (deleted)". It is a name in the
	// process's own mount namespace: whoever can make one of those chooses it,
	// so it proves nothing until compared with the file of that name here.
	Path string
	// Deleted means that the name no longer exists, or that another file has it.
	Deleted bool
	FileID
	UID, GID uint32 // the file's owner
	Mode     uint32 // type and permission bits, as in stat(2)
}

// Exe reads the executed file's path and identity. Kernel threads and zombies
// have none, which is [workload.ErrGone].
func (h *Handle) Exe() (Exe, error) {
	link, err := readlink(h.dir, "exe")
	if err != nil {
		return Exe{}, failed(h.pid, "executable", err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(h.dir, "exe", &st, 0); err != nil {
		return Exe{}, failed(h.pid, "executable", err)
	}
	exe := Exe{Path: link, FileID: fileID(&st), UID: st.Uid, GID: st.Gid, Mode: st.Mode}
	if base, ok := strings.CutSuffix(link, deletedSuffix); ok && !exe.is(link) {
		exe.Path, exe.Deleted = base, true
	}
	return exe, nil
}

// is reports whether path names the executed file here.
func (e Exe) is(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && uint64(st.Dev) == e.Dev && uint64(st.Ino) == e.Inode
}

// Image is one process image, read consistently.
type Image struct {
	workload.Process // ExecID is zero: /proc does not tell it
	Comm             string
	Parent           uint32
	Status
	Exe     Exe
	Cgroups Cgroups
	// MountNS is the inode number of the mount namespace.
	MountNS uint64
	// PIDNS is the inode number of the pid namespace.
	PIDNS uint64
}

// Read reads the image of a process. An image that ended or was replaced while
// it was read is [workload.ErrGone]; so is one without executable.
func (f *FS) Read(pid uint32) (Image, error) {
	h, err := f.Open(pid)
	if err != nil {
		return Image{}, err
	}
	defer h.Close()
	return f.ReadHandle(h)
}

// ReadHandle is Read for a process that is already pinned.
func (f *FS) ReadHandle(h *Handle) (Image, error) {
	first, err := h.Stat()
	if err != nil {
		return Image{}, err
	}
	f.between("stat")
	img := Image{Process: first.Process, Comm: first.Comm, Parent: first.Parent}
	if img.Exe, err = h.Exe(); err != nil {
		return Image{}, err
	}
	f.between("exe")
	if err := img.rest(h); err != nil {
		return Image{}, err
	}
	f.between("rest")
	return img, h.Unchanged(&img)
}

func (img *Image) rest(h *Handle) (err error) {
	if img.Status, err = h.Status(); err != nil {
		return err
	}
	if img.Cgroups, err = h.Cgroups(); err != nil {
		return err
	}
	if img.MountNS, err = h.Namespace("mnt"); err != nil {
		return err
	}
	img.PIDNS, err = h.Namespace("pid")
	return err
}

// Unchanged returns [workload.ErrGone] unless the process is alive, is the one
// that img was read from, and still executes the same file. It reads again only
// what an exit or an execve would have changed, a fraction of Read.
func (h *Handle) Unchanged(img *Image) error {
	exe, err := h.Exe()
	if err != nil {
		return err
	}
	last, err := h.Stat()
	if err != nil {
		return err
	}
	if exe.Dev != img.Exe.Dev || exe.Inode != img.Exe.Inode || !last.Same(img.Process) {
		return fmt.Errorf("process %d: executed another file meanwhile: %w", h.pid, workload.ErrGone)
	}
	return nil
}
