package proc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

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
// processes that hold a socket. See [FS.FindAll].
func (f *FS) FindHolders(ctx context.Context, inode uint64, pids []uint32) ([]Holder, error) {
	found, err := f.FindAll(ctx, []uint64{inode}, pids)
	return found[inode], err
}

// FindAll looks for the holders of several sockets in one walk. It reads every
// descriptor of the processes: everywhere, that is about a microsecond for each
// descriptor on the host. Processes that end meanwhile are passed over;
// those that may not be read are an error if a socket has no holder elsewhere.
func (f *FS) FindAll(ctx context.Context, inodes []uint64, pids []uint32) (map[uint64][]Holder, error) {
	if slices.Contains(inodes, 0) {
		return nil, errors.New("find holders of a socket: no inode number")
	}
	if pids == nil {
		var err error
		if pids, err = f.PIDs(); err != nil {
			return nil, err
		}
	}
	found := make(map[uint64][]Holder, len(inodes))
	unread, err := f.search(ctx, inodes, pids, found, false)
	missing := slices.DeleteFunc(slices.Clone(inodes), func(i uint64) bool { return len(found[i]) > 0 })
	if err == nil && len(missing) > 0 {
		// A thread may have a descriptor table of its own, and the main thread,
		// whose table /proc/PID/fd shows, may have ended.
		unread, err = f.search(ctx, missing, pids, found, true)
	}
	for _, ino := range missing {
		if err == nil && unread != nil && len(found[ino]) == 0 {
			err = fmt.Errorf("find holders of socket %d: %w", ino, unread)
		}
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

// search adds to found. unread is the last failure to read a live process.
func (f *FS) search(ctx context.Context, inodes []uint64, pids []uint32, found map[uint64][]Holder, threads bool) (unread, err error) {
	for _, pid := range pids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := f.searchOne(pid, inodes, found, threads); err != nil && !errors.Is(err, workload.ErrGone) {
			unread = err
		}
	}
	return unread, nil
}

// searchOne looks through one process's descriptor tables.
func (f *FS) searchOne(pid uint32, inodes []uint64, found map[uint64][]Holder, threads bool) error {
	h, err := f.Open(pid)
	if err != nil {
		return err
	}
	defer h.Close()
	held := make(map[uint64]int)
	note := func(fd int, ino uint64) {
		if slices.Contains(inodes, ino) {
			held[ino] = fd
		}
	}
	if threads {
		err = h.threadSockets(note)
	} else {
		err = h.sockets("fd", note)
	}
	if err != nil || len(held) == 0 {
		return err
	}
	st, err := h.Stat()
	if err != nil {
		return err
	}
	for ino, fd := range held {
		found[ino] = append(found[ino], Holder{Process: st.Process, FD: fd})
	}
	return nil
}

// Sockets lists the inode numbers of the sockets that a process holds open.
func (f *FS) Sockets(pid uint32) ([]uint64, error) {
	h, err := f.Open(pid)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var inodes []uint64
	err = h.sockets("fd", func(_ int, ino uint64) { inodes = append(inodes, ino) })
	return inodes, err
}

// sockets calls fn with every socket of a descriptor table.
func (h *Handle) sockets(table string, fn func(fd int, ino uint64)) error {
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
		if err != nil {
			continue // closed meanwhile
		}
		fd, err := strconv.Atoi(name)
		if ino, ok := socketInode(buf[:n]); ok && err == nil {
			fn(fd, ino)
		}
	}
	if err != nil {
		return failed(h.pid, "descriptors", err)
	}
	return nil
}

// socketInode reads a link such as "socket:[4711]".
func socketInode(link []byte) (ino uint64, ok bool) {
	num, ok1 := bytes.CutPrefix(link, []byte("socket:["))
	num, ok2 := bytes.CutSuffix(num, []byte("]"))
	if !ok1 || !ok2 || len(num) == 0 || len(num) > 19 {
		return 0, false
	}
	for _, c := range num {
		if c < '0' || c > '9' {
			return 0, false
		}
		ino = ino*10 + uint64(c-'0')
	}
	return ino, true
}

func (h *Handle) threadSockets(fn func(fd int, ino uint64)) error {
	tfd, err := unix.Openat(h.dir, "task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed(h.pid, "threads", err)
	}
	dir := os.NewFile(uintptr(tfd), "task")
	defer dir.Close()
	tids, err := numeric(dir)
	if err != nil {
		return failed(h.pid, "threads", err)
	}
	for _, tid := range tids {
		err := h.sockets("task/"+strconv.FormatUint(uint64(tid), 10)+"/fd", fn)
		if err != nil && !errors.Is(err, workload.ErrGone) {
			return err
		}
	}
	return nil
}

// Holds reports whether the process still has the socket under the same
// descriptor: one system call, where finding it took thousands.
func (f *FS) Holds(h Holder, inode uint64) bool {
	var buf [64]byte
	path := f.root + "/" + strconv.FormatUint(uint64(h.PID), 10) + "/fd/" + strconv.Itoa(h.FD)
	n, err := unix.Readlink(path, buf[:])
	return err == nil && string(buf[:n]) == "socket:["+strconv.FormatUint(inode, 10)+"]"
}
