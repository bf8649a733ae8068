package iptables

import (
	"fmt"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/workload"
)

// candidate is a process that called before. Its descriptor table is kept open: that
// is a directory of the very process, and empty for ever once it has ended, whoever
// has the number then. A look at one descriptor is one system call.
type candidate struct {
	process workload.Process

	mu    sync.Mutex // held means that table stays open
	table int        // descriptor of /proc/PID/fd; -1 once closed
	fds   []int      // descriptors it called with, the latest last
}

// open makes a candidate of a process that holds a socket.
func (c *callers) open(h proc.Holder) (*candidate, error) {
	table, err := unix.Open("/proc/"+strconv.FormatUint(uint64(h.PID), 10)+"/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("descriptors of process %d: %w", h.PID, err)
	}
	x := &candidate{process: h.Process, table: table, fds: []int{h.FD}}
	if err := c.same(h); err != nil {
		x.close()
		return nil, err
	}
	return x, nil
}

// same reports whether the number of a holder still, or by now, belongs to another
// process. If it does not, it did not a moment ago either.
func (c *callers) same(h proc.Holder) error {
	handle, err := c.procs.Open(h.PID)
	if err != nil {
		return err
	}
	defer handle.Close()
	st, err := handle.Stat()
	if err != nil {
		return err
	}
	if !st.Same(h.Process) {
		return fmt.Errorf("process %d: %w", h.PID, workload.ErrGone)
	}
	return nil
}

// find looks whether the process holds a socket now, under a number that it called
// with before.
func (x *candidate) find(inode uint64) (fd int, ok bool) {
	want := "socket:[" + strconv.FormatUint(inode, 10) + "]"
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.table < 0 {
		return 0, false
	}
	var buf [64]byte
	for _, at := range order(len(x.fds)) {
		n, err := unix.Readlinkat(x.table, strconv.Itoa(x.fds[at]), buf[:])
		if err == nil && string(buf[:n]) == want {
			fd = x.fds[at]
			x.fds = latest(x.fds, fd)
			return fd, true
		}
	}
	return 0, false
}

// order is in which to look at n numbers: at the two latest, then from the one unused
// for longest on. A program that calls now and then uses the same number again; one
// that keeps many connections busy uses its numbers in turn.
func order(n int) []int {
	at := make([]int, 0, n)
	for i := n - 1; i >= max(0, n-2); i-- {
		at = append(at, i)
	}
	for i := range max(0, n-2) {
		at = append(at, i)
	}
	return at
}

// met notes a number that the process called with.
func (x *candidate) met(fd int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.fds = latest(x.fds, fd)
}

func latest(fds []int, fd int) []int {
	if at := slices.Index(fds, fd); at >= 0 {
		fds = slices.Delete(fds, at, at+1)
	} else if len(fds) >= maxHints {
		fds = slices.Delete(fds, 0, 1)
	}
	return append(fds, fd)
}

// close may be called twice.
func (x *candidate) close() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.table >= 0 {
		unix.Close(x.table)
		x.table = -1
	}
}
