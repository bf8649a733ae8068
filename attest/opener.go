package attest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
	"ringfence.dev/cni/netns"
)

// Opener finds the evidence about a connection's opener after the fact, from
// the socket tables and /proc, for captures without a connect hook. local is the
// opener's own address, remote what it dialled, device the interface its socket
// is bound to (zero for none).
//
// It is the weaker kind of evidence. The uid and cgroup are those the socket
// was made with (the cgroup from Linux 5.9 on), but the process is whoever
// holds the socket now. A program that hands its socket on, or keeps it over an
// execve, is named by where the socket is. Holders must agree on the identity.
func (a *Attestor) Opener(ctx context.Context, ns *netns.Handle, local, remote netip.AddrPort, device uint32) (workload.Evidence, error) {
	var s sockdiag.Socket
	err := a.ask(ns, func(c *sockdiag.Conn) (err error) {
		s, err = c.Find(ctx, local, remote, device)
		return err
	})
	if err == nil && s.Inode == 0 {
		err = workload.ErrGone // in TIME_WAIT, or the kernel's own
	}
	if errors.Is(err, sockdiag.ErrNotFound) {
		err = fmt.Errorf("%w: %w", err, workload.ErrGone)
	}
	if err != nil {
		return workload.Evidence{}, fmt.Errorf("opener of %s to %s: %w", local, remote, err)
	}
	ev, err := a.openerOf(ctx, s)
	if err != nil {
		return workload.Evidence{}, fmt.Errorf("opener of %s to %s: %w", local, remote, err)
	}
	return ev, nil
}

func (a *Attestor) openerOf(ctx context.Context, s sockdiag.Socket) (workload.Evidence, error) {
	holders, err := a.nearby(ctx, s)
	if err != nil {
		return workload.Evidence{}, err
	}
	var first workload.Identity
	for _, h := range holders {
		ev, err := a.evidence(h.PID)
		if err != nil {
			return workload.Evidence{}, err
		}
		ev.UID, ev.Source = s.UID, workload.SourceSockDiag
		if s.CgroupID != 0 && a.tree != nil {
			ev.CgroupID = s.CgroupID
		}
		id, err := a.Identify(ctx, ev)
		switch {
		case err != nil:
			return workload.Evidence{}, err
		case !ev.Same(h.Process) || !a.proc.Holds(h, s.Inode) && !a.threadHolds(ctx, h, s.Inode):
			return workload.Evidence{}, workload.ErrGone
		case first.ID.IsZero():
			first = id
		case first.ID != id.ID:
			return workload.Evidence{}, disagree(first, id)
		}
	}
	return first.Evidence, nil
}

// nearby finds a socket's holders: first in the cgroup where it was made, which
// is nearly always right and far cheaper, then everywhere.
func (a *Attestor) nearby(ctx context.Context, s sockdiag.Socket) ([]proc.Holder, error) {
	if pids := a.members(s.CgroupID); len(pids) > 0 {
		if found, err := a.proc.FindHolders(ctx, s.Inode, pids); err == nil && len(found) > 0 {
			return found, nil
		}
	}
	found, err := a.proc.FindHolders(ctx, s.Inode, nil)
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("no process has a descriptor of socket %d: %w", s.Inode, workload.ErrGone)
	}
	return found, err
}

func (a *Attestor) members(id uint64) []uint32 {
	if a.tree == nil || id == 0 {
		return nil
	}
	p, err := a.tree.Path(id)
	if err != nil || p == "/" || a.tree.Unit(p).Kind == cgroup.None {
		return nil // not a place that holds one workload only
	}
	pids, err := a.tree.Processes(p)
	if err != nil {
		return nil
	}
	return pids
}
