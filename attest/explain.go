package attest

import (
	"context"
	"errors"
	"fmt"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/workload"
)

// Explanation tells how evidence led to an identity, or why it did not.
type Explanation struct {
	Evidence workload.Evidence `json:"evidence"`
	Exe      string            `json:"exe,omitempty"`
	// Distrust says why the executable's name proves nothing; empty if it does.
	Distrust string `json:"distrust,omitempty"`
	Cgroup   string `json:"cgroup,omitempty"`
	Unit     string `json:"unit,omitempty"`
	// UnitNote says why there is no unit, where the hierarchies disagree.
	UnitNote string `json:"unit_note,omitempty"`
	// Selectors are all there are, also those that no entry asks for.
	Selectors []workload.Selector `json:"selectors,omitempty"`
	Entries   []EntryResult       `json:"entries,omitempty"`
	// Rule is what gave the ID: "entry", "service", "user service" or "executable".
	Rule     string             `json:"rule,omitempty"`
	Identity *workload.Identity `json:"identity,omitempty"`
	// Err is why there is no identity; nil if there is.
	Err error `json:"-"`
	// Error is Err in words.
	Error string `json:"error,omitempty"`
}

// Explain does what [Attestor.Identify] does, without its caches' results and
// with every selector, and keeps the steps.
func (a *Attestor) Explain(ctx context.Context, ev workload.Evidence) Explanation {
	x := Explanation{Evidence: ev}
	f, err := a.look(ctx, ev, all())
	if err != nil {
		return x.failed(err)
	}
	x.Evidence, x.Selectors = f.evidence, f.selectors
	x.Exe, x.Distrust = f.image.Exe.Path, f.image.standing.why
	x.Cgroup, x.UnitNote = f.cgroup, f.unitNote
	if f.unit.Kind != cgroup.None {
		x.Unit = f.unit.String()
	}
	for i := range a.entries {
		e := &a.entries[i]
		x.Entries = append(x.Entries, EntryResult{ID: e.id, Selectors: e.selectors, Missing: missing(e, f.selectors)})
	}
	id, err := f.decide(a)
	x.Rule = f.rule
	if err != nil {
		return x.failed(err)
	}
	x.Identity = &id
	return x
}

func (x Explanation) failed(err error) Explanation {
	x.Err, x.Error = err, err.Error()
	return x
}

// ExplainPID explains a process as it is now.
func (a *Attestor) ExplainPID(ctx context.Context, pid uint32) Explanation {
	ev, err := a.evidence(pid)
	if err != nil {
		return Explanation{Evidence: workload.Evidence{Process: workload.Process{PID: pid}}}.failed(err)
	}
	return a.Explain(ctx, ev)
}

// evidence makes evidence out of a process's present state.
func (a *Attestor) evidence(pid uint32) (workload.Evidence, error) {
	h, err := a.proc.Open(pid)
	if err != nil {
		return workload.Evidence{}, err
	}
	defer h.Close()
	return a.evidenceOf(h)
}

func (a *Attestor) evidenceOf(h *proc.Handle) (workload.Evidence, error) {
	st, err := h.Stat()
	if err != nil {
		return workload.Evidence{}, err
	}
	if st.Kernel {
		return workload.Evidence{}, fmt.Errorf("process %d is a thread of the kernel: %w", st.PID, workload.ErrUnknown)
	}
	who, err := h.Status()
	if err != nil {
		return workload.Evidence{}, err
	}
	// Real ids, as bpf_get_current_uid_gid gives them to the connect hook: one
	// service must not be two because it both dials and listens.
	ev := workload.Evidence{Process: st.Process, UID: who.UID, GID: who.GID, Source: workload.SourceListener}
	if a.tree == nil {
		return ev, nil
	}
	cg, err := h.Cgroups()
	if err != nil {
		return ev, err
	}
	if ev.CgroupID, err = a.tree.ID(cg.V2); errors.Is(err, cgroup.ErrNotFound) {
		err = nil // removed, or outside of our cgroup namespace: zero says unknown
	}
	return ev, err
}
