package agent

import (
	"context"
	"fmt"
	"slices"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/policy/authz"
)

// maxUncovered bounds the list of connections that were there before.
const maxUncovered = 1000

// noteUncovered lists the connections that were open before the scope was
// added: capture cannot touch them, so the operator must know of them. In watch
// mode nothing is covered, and so nothing is missing.
func (a *Agent) noteUncovered(ctx context.Context, sc *scope) {
	a.mu.Lock()
	mode := sc.settings.Mode
	a.mu.Unlock()
	if mode == authz.Watch {
		return
	}
	open, err := connections(ctx, sc)
	if err != nil {
		a.log.Warn("cannot list connections that were open before", "scope", sc.settings.Name, "err", err)
		return
	}
	list := []admin.Uncovered{}
	var inodes []uint64
	for _, s := range open {
		if len(list) == maxUncovered {
			break
		}
		if a.mayBeUncovered(sc, s) {
			list = append(list, admin.Uncovered{
				Local: s.Source.String(), Remote: s.Destination.String(), Cookie: s.Cookie,
				Reason: "open before the scope was added",
			})
			inodes = append(inodes, s.Inode)
		}
	}
	nameHolders(ctx, list, inodes)
	a.mu.Lock()
	sc.uncovered = list
	a.mu.Unlock()
	if len(list) > 0 {
		a.log.Warn("connections were open before the scope was added and stay uncovered: restart their programs",
			"scope", sc.settings.Name, "connections", len(list))
	}
}

// mayBeUncovered leaves out what is nobody's any more, what is the agent's own,
// what the scope leaves alone, and, unless loopback is captured too, what never
// leaves the namespace.
func (a *Agent) mayBeUncovered(sc *scope, s sockdiag.Socket) bool {
	if s.Inode == 0 || a.leaf != 0 && s.CgroupID == a.leaf {
		return false
	}
	if agentPort(s.Destination.Port()) && s.Destination.Addr().IsLoopback() {
		return false // redirected to us
	}
	if sc.settings.Loopback != capture.LoopbackEnforce && sc.addrs.isLocal(s.Destination.Addr()) {
		return false
	}
	return sc.cover == nil || sc.cover.coversID(s.CgroupID)
}

// nameHolders fills in who holds the sockets, in one walk over all processes.
func nameHolders(ctx context.Context, list []admin.Uncovered, inodes []uint64) {
	if len(list) == 0 {
		return
	}
	fs := proc.New("")
	found, err := fs.FindAll(ctx, slices.Sorted(slices.Values(inodes)), nil)
	if err != nil {
		return // the connections are listed all the same
	}
	for i, inode := range inodes {
		if holders := found[inode]; len(holders) > 0 {
			list[i].PID = holders[0].PID
			list[i].Process = exeOf(fs, holders[0].PID)
		}
	}
}

func exeOf(fs *proc.FS, pid uint32) string {
	h, err := fs.Open(pid)
	if err != nil {
		return ""
	}
	defer h.Close()
	exe, err := h.Exe()
	if err != nil {
		return ""
	}
	return exe.Path
}

// stillUncovered returns those of the list that are still open.
func (a *Agent) stillUncovered(ctx context.Context, sc *scope) []admin.Uncovered {
	a.mu.Lock()
	list := sc.uncovered
	a.mu.Unlock()
	left := []admin.Uncovered{}
	if len(list) == 0 {
		return left
	}
	socks, err := connections(ctx, sc)
	if err != nil {
		return list
	}
	open := make(map[uint64]bool, len(socks))
	for _, s := range socks {
		open[s.Cookie] = true
	}
	for _, u := range list {
		if open[u.Cookie] {
			left = append(left, u)
		}
	}
	// What has ended does not come back: a short list is quick to look at.
	a.mu.Lock()
	if len(sc.uncovered) == len(list) {
		sc.uncovered = left
	}
	a.mu.Unlock()
	return left
}

func connections(ctx context.Context, sc *scope) ([]sockdiag.Socket, error) {
	conn, err := sockdiag.Open(sc.ns)
	if err != nil {
		return nil, fmt.Errorf("ask for sockets: %w", err)
	}
	defer conn.Close()
	return conn.Connections(ctx)
}
