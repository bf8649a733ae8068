package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/workload"
)

// Holder is a process with a descriptor of a socket.
type Holder struct {
	workload.Process
	FD int // one of its descriptors of the socket
}

// Holders is [FS.Holders] on /proc.
func Holders(inode uint64) ([]workload.Process, error) { return New("").Holders(inode) }

// Holders returns the processes that hold the socket with this sockfs inode
// number open, in no order. None is no error: sockets in flight over a unix
// socket, or registered with io_uring only, have no descriptor.
func (f *FS) Holders(inode uint64) ([]workload.Process, error) {
	found, err := f.FindHolders(context.Background(), inode, nil)
	procs := make([]workload.Process, len(found))
	for i, h := range found {
		procs[i] = h.Process
	}
	return procs, err
}

// FindHolders looks among pids, or everywhere when pids is nil, for the
// processes that hold a socket. It walks descriptor tables, so everywhere
// costs about a millisecond for a hundred processes. Processes that end
// meanwhile are passed over; those that may not be read are an error, unless a
// holder was found elsewhere.
func (f *FS) FindHolders(ctx context.Context, inode uint64, pids []uint32) ([]Holder, error) {
	if inode == 0 {
		return nil, errors.New("find holders of a socket: no inode number")
	}
	if pids == nil {
		var err error
		if pids, err = f.PIDs(); err != nil {
			return nil, err
		}
	}
	found, unread, err := f.search(ctx, inode, pids, false)
	if err == nil && len(found) == 0 {
		// A thread may have a descriptor table of its own, and the main thread,
		// whose table /proc/PID/fd shows, may have ended.
		found, unread, err = f.search(ctx, inode, pids, true)
	}
	if err == nil && len(found) == 0 && unread != nil {
		err = fmt.Errorf("find holders of socket %d: %w", inode, unread)
	}
	return found, err
}

// PIDs lists the processes there are.
func (f *FS) PIDs() ([]uint32, error) {
	dir, err := os.Open(f.root)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer dir.Close()
	return numeric(dir)
}

func numeric(dir *os.File) ([]uint32, error) {
	names, err := dir.Readdirnames(-1)
	pids := make([]uint32, 0, len(names))
	for _, name := range names {
		if n, err := strconv.ParseUint(name, 10, 32); err == nil {
			pids = append(pids, uint32(n))
		}
	}
	return pids, err
}

func (f *FS) search(ctx context.Context, inode uint64, pids []uint32, threads bool) (found []Holder, unread, err error) {
	want := "socket:[" + strconv.FormatUint(inode, 10) + "]"
	for _, pid := range pids {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		holder, ok, err := f.holds(pid, want, threads)
		switch {
		case ok:
			found = append(found, holder)
		case err != nil && !errors.Is(err, workload.ErrGone):
			unread = err
		}
	}
	return found, unread, nil
}

// holds looks for a link in one process's descriptor tables.
func (f *FS) holds(pid uint32, want string, threads bool) (Holder, bool, error) {
	h, err := f.Open(pid)
	if err != nil {
		return Holder{}, false, err
	}
	defer h.Close()
	fd, err := h.descriptor("fd", want)
	if threads && fd < 0 {
		fd, err = h.threadDescriptor(want)
	}
	if fd < 0 {
		return Holder{}, false, err
	}
	st, err := h.Stat()
	if err != nil {
		return Holder{}, false, err
	}
	return Holder{Process: st.Process, FD: fd}, true, nil
}

// Sockets lists the inode numbers of the sockets that a process holds open.
func (f *FS) Sockets(pid uint32) ([]uint64, error) {
	h, err := f.Open(pid)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var inodes []uint64
	err = h.descriptors("fd", func(_, link string) bool {
		num, ok := strings.CutPrefix(strings.TrimSuffix(link, "]"), "socket:[")
		if ino, err := strconv.ParseUint(num, 10, 64); ok && err == nil {
			inodes = append(inodes, ino)
		}
		return true
	})
	return inodes, err
}

// descriptor returns the number of a descriptor whose link is want, or -1.
func (h *Handle) descriptor(table, want string) (int, error) {
	fd := -1
	err := h.descriptors(table, func(name, link string) bool {
		if link == want {
			fd, _ = strconv.Atoi(name) // the kernel's own numbers
		}
		return link != want
	})
	return fd, err
}

// descriptors calls fn with every descriptor of a table until it returns false.
func (h *Handle) descriptors(table string, fn func(name, link string) bool) error {
	dfd, err := unix.Openat(h.dir, table, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed(h.pid, "descriptors", err)
	}
	dir := os.NewFile(uintptr(dfd), table)
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	var buf [64]byte // links to files are cut short, which is of no interest
	for _, name := range names {
		n, err := unix.Readlinkat(dfd, name, buf[:])
		if err == nil && !fn(name, string(buf[:n])) {
			return nil
		}
	}
	if err != nil {
		return failed(h.pid, "descriptors", err)
	}
	return nil
}

func (h *Handle) threadDescriptor(want string) (int, error) {
	tfd, err := unix.Openat(h.dir, "task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, failed(h.pid, "threads", err)
	}
	dir := os.NewFile(uintptr(tfd), "task")
	defer dir.Close()
	tids, err := numeric(dir)
	if err != nil {
		return -1, failed(h.pid, "threads", err)
	}
	for _, tid := range tids {
		fd, err := h.descriptor("task/"+strconv.FormatUint(uint64(tid), 10)+"/fd", want)
		if fd >= 0 || err != nil && !errors.Is(err, workload.ErrGone) {
			return fd, err
		}
	}
	return -1, nil
}

// Holds reports whether the process still has the socket under the same
// descriptor: one system call, where finding it took thousands.
func (f *FS) Holds(h Holder, inode uint64) bool {
	var buf [64]byte
	path := f.root + "/" + strconv.FormatUint(uint64(h.PID), 10) + "/fd/" + strconv.Itoa(h.FD)
	n, err := unix.Readlink(path, buf[:])
	return err == nil && string(buf[:n]) == "socket:["+strconv.FormatUint(inode, 10)+"]"
}
