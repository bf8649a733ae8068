package observe

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
)

// finder names the processes behind sockets.
type finder struct {
	procs *proc.FS
	tree  *cgroup.Tree // nil without cgroup v2
}

// owner is what is known about a socket's process; zero where nobody, or more
// than one program, holds it.
type owner struct {
	workload.Process
	comm string
}

func newFinder() *finder {
	f := &finder{procs: proc.New("")}
	f.tree, _ = cgroup.Open(cgroup.Config{})
	return f
}

// find looks for the processes of all new sockets of one sample at once: each
// cgroup's descriptor tables are walked once, and those of the whole machine at
// most once, however many sockets there are.
func (f *finder) find(ctx context.Context, sockets []sockdiag.Socket) map[uint64]owner {
	held := map[uint64][]proc.Holder{} // by inode
	var missing []uint64
	for id, inodes := range byCgroup(sockets) {
		if pids := f.members(id); len(pids) > 0 {
			found, _ := f.procs.FindAll(ctx, inodes, pids)
			maps.Copy(held, found)
		}
		for _, inode := range inodes {
			if len(held[inode]) == 0 {
				missing = append(missing, inode)
			}
		}
	}
	if len(missing) > 0 {
		found, _ := f.procs.FindAll(ctx, missing, nil)
		maps.Copy(held, found)
	}
	owners := make(map[uint64]owner, len(held))
	comms := map[uint32]string{}
	for inode, holders := range held {
		if len(holders) > 0 {
			owners[inode] = oldest(holders, comms)
		}
	}
	return owners
}

// byCgroup lists the inode numbers of sockets that a process may hold.
func byCgroup(sockets []sockdiag.Socket) map[uint64][]uint64 {
	inodes := map[uint64][]uint64{}
	for _, s := range sockets {
		if s.Inode != 0 {
			inodes[s.CgroupID] = append(inodes[s.CgroupID], s.Inode)
		}
	}
	return inodes
}

// oldest is the process that opened a socket: forked workers share a listener.
func oldest(holders []proc.Holder, comms map[uint32]string) owner {
	h := slices.MinFunc(holders, func(a, b proc.Holder) int { return cmp.Compare(a.StartTime, b.StartTime) })
	comm, ok := comms[h.PID]
	if !ok {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", h.PID))
		comm = trimComm(text)
		comms[h.PID] = comm
	}
	return owner{h.Process, comm}
}

// evidence is what a socket's event says of its owner.
func (o owner) evidence(s sockdiag.Socket) workload.Evidence {
	return workload.Evidence{Process: o.Process, UID: s.UID, CgroupID: s.CgroupID, Source: workload.SourceSockDiag}
}

// members lists the processes of the cgroup in which a socket was made.
func (f *finder) members(id uint64) []uint32 {
	if f.tree == nil || id == 0 {
		return nil
	}
	path, err := f.tree.Path(id)
	if err != nil || path == "/" {
		return nil
	}
	pids, err := f.tree.Processes(path)
	if err != nil {
		return nil
	}
	return pids
}
