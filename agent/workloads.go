package agent

import (
	"context"
	"fmt"
	"slices"

	"ringfence.dev/agent/admin"
	"ringfence.dev/attest"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/policy/authz"
)

// workloads lists who listens in a scope, one row for each identity. In watch
// mode programs are named even where their name proves nothing.
func (a *Agent) workloads(ctx context.Context, sc *scope) []admin.Workload {
	socks, err := sockdiag.Listeners(sc.ns)
	if err != nil {
		return []admin.Workload{{Scope: sc.settings.Name, Name: "unknown", Listening: []string{}, Problem: err.Error()}}
	}
	a.mu.Lock()
	who := a.attestor
	if sc.settings.Mode == authz.Watch {
		who = a.watcher
	}
	a.mu.Unlock()
	rows := &workloadRows{by: map[string]*admin.Workload{}}
	socks = slices.DeleteFunc(socks, a.isOurs)
	held := holdersOf(ctx, socks)
	known := map[string]admin.Workload{}
	for _, s := range socks {
		w, ok := known[held[s.Inode]]
		if !ok {
			w = a.workload(ctx, sc, who, s)
			if by := held[s.Inode]; by != "" && w.Problem == "" {
				known[by] = w
			}
		}
		rows.add(w, s.Source.String())
	}
	for _, st := range a.svids.Status() {
		if w := rows.by[st.ID.String()]; w != nil && !st.NotAfter.IsZero() {
			at := st.NotAfter
			w.SVIDExpires = &at
		}
	}
	return rows.list()
}

// holdersOf names, for each socket's inode, the set of processes that hold it, in
// one walk over all processes. Sockets of one set are one program's, so that a
// program with a thousand ports is attested once. PID 1 holds sockets for many
// services, and what nobody is seen to hold has no set: those are looked at one by one.
func holdersOf(ctx context.Context, socks []sockdiag.Socket) map[uint64]string {
	var inodes []uint64
	for _, s := range socks {
		if s.Inode != 0 {
			inodes = append(inodes, s.Inode)
		}
	}
	sets := map[uint64]string{}
	if len(inodes) == 0 {
		return sets
	}
	found, err := proc.New("").FindAll(ctx, inodes, nil)
	if err != nil && found == nil {
		return sets
	}
	for inode, holders := range found {
		pids := make([]uint32, len(holders))
		for i, h := range holders {
			pids[i] = h.PID
		}
		if slices.Sort(pids); len(pids) > 0 && pids[0] != 1 {
			sets[inode] = fmt.Sprint(pids)
		}
	}
	return sets
}

// isOurs is true for the agent's own listeners. Another program may sit on one of
// its ports while the scope is only watched, and is shown.
func (a *Agent) isOurs(s sockdiag.Socket) bool {
	if a.leaf != 0 {
		return s.CgroupID == a.leaf
	}
	return agentPort(s.Source.Port())
}

func (a *Agent) workload(ctx context.Context, sc *scope, by *attest.Attestor, s sockdiag.Socket) admin.Workload {
	id, err := by.Owner(ctx, sc.ns, s.Source)
	w := admin.Workload{Scope: sc.settings.Name, Name: id.Name, Unit: id.Unit, Exe: id.Exe, PID: id.Evidence.PID}
	if !id.ID.IsZero() {
		w.ID = id.ID.String()
	}
	if err != nil {
		w.Problem = err.Error()
	}
	w.Name = or(w.Name, s.Source.String())
	return w
}

// workloadRows gathers listening addresses by identity, in the order found.
type workloadRows struct {
	by    map[string]*admin.Workload
	order []string
}

func (r *workloadRows) add(w admin.Workload, at string) {
	key := w.ID
	if w.Problem != "" || key == "" {
		key = at
	}
	if r.by[key] == nil {
		r.by[key] = &w
		r.order = append(r.order, key)
	}
	if row := r.by[key]; !slices.Contains(row.Listening, at) {
		row.Listening = append(row.Listening, at)
	}
}

func (r *workloadRows) list() []admin.Workload {
	list := make([]admin.Workload, 0, len(r.order))
	for _, key := range r.order {
		list = append(list, *r.by[key])
	}
	return list
}
