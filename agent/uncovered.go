package agent

import (
	"context"

	"ringfence.dev/agent/admin"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
)

// maxUncovered bounds the list of connections that were there before.
const maxUncovered = 1000

// noteUncovered lists the connections that were open before the scope was
// added: capture cannot touch them, so the operator must know of them. Those
// over loopback are left out where loopback is not captured anyway.
func (a *Agent) noteUncovered(ctx context.Context, sc *scope) {
	conn, err := sockdiag.Open(sc.ns)
	if err != nil {
		a.log.Warn("cannot list connections that were open before", "scope", sc.settings.Name, "err", err)
		return
	}
	defer conn.Close()
	socks, err := conn.Connections(ctx)
	if err != nil {
		a.log.Warn("cannot list connections that were open before", "scope", sc.settings.Name, "err", err)
		return
	}
	var list []admin.Uncovered
	for _, s := range socks {
		if len(list) == maxUncovered {
			break
		}
		if s.Inode == 0 || s.CgroupID == a.leaf || s.Destination.Addr().IsLoopback() {
			continue // nobody's any more, our own, or not captured in any case
		}
		u := admin.Uncovered{
			Local: s.Source.String(), Remote: s.Destination.String(), Cookie: s.Cookie,
			Reason: "open before the scope was added",
		}
		if holders, err := proc.Holders(s.Inode); err == nil && len(holders) > 0 {
			u.PID = holders[0].PID
		}
		list = append(list, u)
	}
	a.mu.Lock()
	sc.uncovered = list
	a.mu.Unlock()
}

// stillUncovered returns those of the list that are still open.
func (a *Agent) stillUncovered(ctx context.Context, sc *scope, list []admin.Uncovered) []admin.Uncovered {
	if len(list) == 0 {
		return nil
	}
	conn, err := sockdiag.Open(sc.ns)
	if err != nil {
		return list
	}
	defer conn.Close()
	socks, err := conn.Connections(ctx)
	if err != nil {
		return list
	}
	open := make(map[uint64]bool, len(socks))
	for _, s := range socks {
		open[s.Cookie] = true
	}
	var left []admin.Uncovered
	for _, u := range list {
		if open[u.Cookie] {
			left = append(left, u)
		}
	}
	return left
}
