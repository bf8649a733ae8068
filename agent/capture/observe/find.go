package observe

import (
	"context"
	"fmt"
	"os"
	"slices"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
)

// searches bounds how often per round all descriptor tables of the machine are
// walked, at about a millisecond for a hundred processes each. Most sockets are
// found in their own cgroup, which costs next to nothing.
const searches = 64

// finder names the process behind a socket.
type finder struct {
	procs *proc.FS
	tree  *cgroup.Tree // nil without cgroup v2
	left  int          // searches left in this round; owned by the sampling goroutine
}

func newFinder() *finder {
	f := &finder{procs: proc.New("")}
	f.tree, _ = cgroup.Open(cgroup.Config{})
	return f
}

func (f *finder) refill() { f.left = searches }

// find returns what is known about a socket's owner. The process stays unknown
// when nobody, or more than one program, holds the socket.
func (f *finder) find(s sockdiag.Socket) (workload.Evidence, string) {
	e := workload.Evidence{UID: s.UID, CgroupID: s.CgroupID, Source: workload.SourceSockDiag}
	if s.Inode == 0 {
		return e, ""
	}
	holders := f.near(s)
	if len(holders) == 0 && f.left > 0 {
		f.left--
		holders, _ = f.procs.FindHolders(context.Background(), s.Inode, nil)
	}
	if len(holders) == 0 {
		return e, ""
	}
	// Forked workers share a listener; the oldest is the one that opened it.
	oldest := slices.MinFunc(holders, func(a, b proc.Holder) int {
		return int(min(max(int64(a.StartTime)-int64(b.StartTime), -1), 1))
	})
	e.Process = oldest.Process
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", oldest.PID))
	return e, trimComm(comm)
}

// near looks among the processes of the cgroup in which the socket was made.
func (f *finder) near(s sockdiag.Socket) []proc.Holder {
	if f.tree == nil || s.CgroupID == 0 {
		return nil
	}
	path, err := f.tree.Path(s.CgroupID)
	if err != nil || path == "/" {
		return nil
	}
	pids, err := f.tree.Processes(path)
	if err != nil || len(pids) == 0 {
		return nil
	}
	holders, _ := f.procs.FindHolders(context.Background(), s.Inode, pids)
	return holders
}
