package iptables

import (
	"bytes"
	"context"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
)

// Bounds of what is remembered about callers: groups of a cgroup and a user, in
// each the processes that were the latest to call, and of each the descriptors it
// called with. A process costs a descriptor of ours, so there is a bound on all of them.
const (
	maxGroups     = 1024
	maxCandidates = 8
	maxHints      = 128
	maxKept       = 512
)

// callers finds the processes that hold calling sockets. Programs call again and
// again, and their sockets get the same few descriptor numbers, so the former
// answers are tried first. Nothing is believed for having been true before: each
// answer is read from /proc/PID/fd.
type callers struct {
	procs *proc.FS
	tree  *cgroup.Tree
	// walk is held by the one that searches every process of the machine, so that
	// callers that cannot be found take one thread and not all.
	walk chan struct{}

	mu     sync.Mutex             // held means that the maps do not change
	groups map[group][]*candidate // the latest last
	kept   int                    // candidates in groups
	paths  map[uint64]string      // of cgroups, by id: an id is never used twice, and cgroups v2 are never renamed
}

// group is the maker of a socket as the kernel tells it.
type group struct {
	cgroup uint64 // zero where the kernel does not tell, before Linux 5.9
	uid    uint32
}

func newCallers(procs *proc.FS, tree *cgroup.Tree) *callers {
	return &callers{
		procs: procs, tree: tree, walk: make(chan struct{}, 1),
		groups: map[group][]*candidate{}, paths: map[uint64]string{},
	}
}

// close forgets all callers. Others may still be asking.
func (c *callers) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clearLocked()
}

func (c *callers) clearLocked() {
	for _, list := range c.groups {
		for _, x := range list {
			x.close()
		}
	}
	clear(c.groups)
	c.kept = 0
}

// holders returns the processes that hold a socket: those that called before,
// with whoever inherited the socket from them; else the members of the cgroup
// where the socket was made; else anybody. None is no error.
//
// Who has been given a socket, and is not in that cgroup, is not looked for as
// long as somebody there holds it: a search of the whole machine for each
// connection costs more than that doubt is worth in this weaker kind of evidence.
func (c *callers) holders(ctx context.Context, s sockdiag.Socket) ([]proc.Holder, error) {
	g := group{s.CgroupID, s.UID}
	members := c.members(s.CgroupID)
	if found := c.again(g, s.Inode, members); len(found) > 0 {
		return found, nil
	}
	var found []proc.Holder
	if len(members) > 0 {
		found, _ = c.procs.FindHolders(ctx, s.Inode, members)
	}
	var err error
	if len(found) == 0 {
		found, err = c.everywhere(ctx, s.Inode)
	}
	for _, h := range found {
		c.remember(g, h)
	}
	return found, err
}

func (c *callers) everywhere(ctx context.Context, inode uint64) ([]proc.Holder, error) {
	select {
	case c.walk <- struct{}{}:
		defer func() { <-c.walk }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return c.procs.FindHolders(ctx, inode, nil)
}

// members lists the processes in a cgroup; none when it is not known or gone.
func (c *callers) members(id uint64) []uint32 {
	if id == 0 {
		return nil
	}
	c.mu.Lock()
	path, known := c.paths[id]
	c.mu.Unlock()
	if !known {
		var err error
		if path, err = c.tree.Path(id); err != nil {
			return nil
		}
		c.mu.Lock()
		if len(c.paths) >= maxGroups {
			clear(c.paths)
		}
		c.paths[id] = path
		c.mu.Unlock()
	}
	// A path that another cgroup has by now lists processes that do not hold the socket.
	pids, err := c.processes(path)
	if err != nil {
		c.mu.Lock()
		delete(c.paths, id)
		c.mu.Unlock()
	}
	return pids
}

// maxProcesses bounds what is read of a cgroup's list: some hundred thousand.
const maxProcesses = 1 << 20

// processes lists the processes directly in a cgroup, as [cgroup.Tree.Processes] does,
// in half the system calls: os.ReadFile also asks for the size and registers with
// the poller, and this is done for each connection.
func (c *callers) processes(path string) (pids []uint32, err error) {
	fd, err := unix.Open(c.tree.Root()+path+"/cgroup.procs", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var some [1024]byte // most cgroups have one process, or a few
	text := some[:0]
	for len(text) < maxProcesses {
		if len(text) == cap(text) {
			text = slices.Grow(text, len(text))
		}
		n, err := unix.Read(fd, text[len(text):cap(text)])
		if err != nil || n == 0 {
			return numbers(text), err
		}
		text = text[:len(text)+n]
	}
	return numbers(text), nil
}

// numbers reads one number a line. 0 stands for a process outside of our pid namespace.
func numbers(text []byte) (pids []uint32) {
	for line := range bytes.Lines(text) {
		if n, err := strconv.ParseUint(string(bytes.TrimSpace(line)), 10, 32); err == nil && n != 0 {
			pids = append(pids, uint32(n))
		}
	}
	return pids
}

// again tries who called before. The first that holds the socket is joined by all
// members of the cgroup that have it under the same number, or as their standard
// input: what a fork, or a server that is started for each connection, leaves.
func (c *callers) again(g group, inode uint64, members []uint32) []proc.Holder {
	c.mu.Lock()
	list := slices.Clone(c.groups[g])
	c.mu.Unlock()
	for _, x := range slices.Backward(list) {
		if len(members) > 0 && !slices.Contains(members, x.process.PID) {
			continue
		}
		if fd, ok := x.find(inode); ok {
			h := proc.Holder{Process: x.process, FD: fd}
			return append(c.heirs(h, inode, members), h)
		}
	}
	return nil
}

// heirs are the members that have a holder's socket as well.
func (c *callers) heirs(of proc.Holder, inode uint64, members []uint32) (found []proc.Holder) {
	for _, pid := range members {
		if pid == of.PID {
			continue
		}
		h, ok := c.confirm(pid, of.FD, inode)
		if !ok && of.FD != 0 {
			h, ok = c.confirm(pid, 0, inode)
		}
		if ok {
			found = append(found, h)
		}
	}
	return found
}

// confirm reads who a process is that holds a socket under a number. It is pinned
// while the descriptor is looked at, so that both are about the same process.
func (c *callers) confirm(pid uint32, fd int, inode uint64) (h proc.Holder, ok bool) {
	h = proc.Holder{Process: workload.Process{PID: pid}, FD: fd}
	if !c.procs.Holds(h, inode) {
		return h, false
	}
	handle, err := c.procs.Open(pid)
	if err != nil {
		return h, false
	}
	defer handle.Close()
	st, err := handle.Stat()
	if err != nil || !c.procs.Holds(h, inode) {
		return h, false
	}
	h.Process = st.Process
	return h, true
}

// remember makes a holder the latest candidate of its group.
func (c *callers) remember(g group, h proc.Holder) {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := c.groups[g]
	at := slices.IndexFunc(list, func(x *candidate) bool { return x.process.Same(h.Process) })
	if at >= 0 {
		x := list[at]
		x.met(h.FD)
		c.groups[g] = append(slices.Delete(list, at, at+1), x)
		return
	}
	x, err := c.open(h)
	if err != nil {
		return // gone already
	}
	if _, known := c.groups[g]; c.kept >= maxKept || !known && len(c.groups) >= maxGroups {
		c.clearLocked() // rather than keeping an order: to find somebody again costs a search
		list = nil
	}
	if len(list) >= maxCandidates {
		list[0].close()
		list = slices.Delete(list, 0, 1)
		c.kept--
	}
	c.groups[g] = append(list, x)
	c.kept++
}
