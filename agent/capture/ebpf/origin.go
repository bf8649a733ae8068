package ebpf

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/capture/outgoing"
	"ringfence.dev/attest/workload"
	"ringfence.dev/bpf"
	"ringfence.dev/proxy/flow"
)

// Origin takes out the note of an accepted outbound connection, so a second
// call finds none. Of an inbound one the socket's own addresses tell everything:
// steering changes the socket that answers, not the addresses. A connection
// dialled straight to a port of the agent is [capture.ErrNoOrigin].
func (b *Backend) Origin(name string, d flow.Direction, _ int, local, remote netip.AddrPort) (flow.Flow, error) {
	s := b.lookup(name)
	if s == nil {
		return flow.Flow{}, fmt.Errorf("origin in scope %s: %w", name, capture.ErrNoScope)
	}
	local, remote = unmap(local), unmap(remote)
	f := flow.Flow{Scope: name, Direction: d, Source: remote, Destination: local}
	if d == flow.Inbound {
		if isOwnPort(local.Port()) {
			return flow.Flow{}, capture.ErrNoOrigin
		}
		return f, nil
	}
	n, err := b.takeNote(bpf.Connection(s.cookie, remote, local))
	if err != nil {
		return flow.Flow{}, err
	}
	if self := bpf.FromAddress(n.Self); self.IsValid() && !self.IsUnspecified() {
		f.Source = netip.AddrPortFrom(self, remote.Port())
	}
	f.Destination = netip.AddrPortFrom(bpf.FromAddress(n.Dst), bpf.FromPort(n.Dport))
	f.Caller = evidenceOf(&n)
	f.BoundSource = bpf.FromAddress(n.Bound)
	if n.Device != 1 { // bound to lo, which the redirect keeps
		f.Device = n.Device
	}
	return f, nil
}

func (b *Backend) takeNote(key bpf.ConnKey) (n bpf.Note, err error) {
	n, err = b.inst.TakeNote(key)
	switch {
	case errors.Is(err, bpf.ErrNoEntry):
		return n, capture.ErrNoOrigin
	case err != nil:
		return n, fmt.Errorf("read note: %w", err)
	}
	return n, nil
}

func evidenceOf(n *bpf.Note) workload.Evidence {
	return workload.Evidence{
		Process: workload.Process{PID: n.Tgid, StartTime: n.Start, ExecID: n.ExecId},
		UID:     n.Uid, GID: n.Gid, CgroupID: n.Cgroup,
		Source: workload.SourceHook,
	}
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

func isOwnPort(p uint16) bool {
	return p == capture.OutboundPort || p == capture.InboundPort || p == capture.TunnelPort
}

// BeforeConnect prepares a socket of the agent for one dial. A dial to a
// workload of this namespace is exempted from steering, and shows client as the
// workload's peer when client is valid. A dial that leaves is bound as the
// caller's socket was. Capture at connect(2) never touches the agent's leaf.
func (b *Backend) BeforeConnect(name string, fd int, to, client netip.AddrPort, f flow.Flow) error {
	s := b.lookup(name)
	if s == nil {
		return fmt.Errorf("dial in scope %s: %w", name, capture.ErrNoScope)
	}
	if client.IsValid() || b.isLocal(s, to.Addr()) {
		st := bpf.SockState{Kind: bpf.SockAgent}
		if client.IsValid() {
			st.Note.Dst, st.Note.Dport = bpf.Address(client.Addr().Unmap()), bpf.Port(client.Port())
		}
		if err := b.inst.MarkSocket(fd, st); err != nil {
			return fmt.Errorf("exempt socket from capture: %w", err)
		}
		return nil
	}
	return outgoing.BindLike(fd, to.Addr(), f)
}

// settle is how long after a change of policy no refusal is pushed down: longer
// than a decision takes from its snapshot to its Refused call.
const settle = time.Second

// Refused makes the connect hook refuse the caller's next dial to the same
// destination by itself, for [refusedFor] or until policy changes: the decision
// may rest on who owns the destination, which no policy tells. The refusal holds for the
// caller's process image, or for its cgroup, uid and gid together when the
// identity's selectors name nothing narrower. Without start time (no BTF) a
// process cannot be told from the next one under its pid, and nothing is done.
func (b *Backend) Refused(name string, f flow.Flow, who workload.Identity) {
	s := b.lookup(name)
	if s == nil || f.Direction != flow.Outbound || f.Caller.Source != workload.SourceHook || f.Caller.CgroupID == 0 {
		return
	}
	key := bpf.DenyKey{
		Netns: s.cookie, Cgroup: f.Caller.CgroupID, Uid: f.Caller.UID, Gid: f.Caller.GID,
		Dst: bpf.Address(f.Destination.Addr()), Dport: bpf.Port(f.Destination.Port()),
	}
	if !wholeCgroup(who) {
		if f.Caller.StartTime == 0 {
			return
		}
		key.Tgid, key.Start, key.ExecId = f.Caller.PID, f.Caller.StartTime, f.Caller.ExecID
	}
	b.beat.Lock()
	generation, changed := b.agent.Generation, b.changed
	b.beat.Unlock()
	if time.Since(changed) < settle {
		return // it may have been decided by the policy that has just gone
	}
	deny := bpf.Deny{Generation: generation, Until: monotonic() + uint64(refusedFor)}
	if err := b.inst.Maps.RfDenies.Put(key, deny); err != nil {
		b.log.Warn("refusal not pushed down; the agent refuses by itself", "scope", name, "error", err)
	}
}

// refusedFor is how long the connect hook refuses without asking the agent again.
const refusedFor = 10 * time.Second

// wholeCgroup reports whether the identity follows from cgroup, uid and gid alone.
func wholeCgroup(who workload.Identity) bool {
	unit := false
	for _, sel := range who.Selectors {
		switch {
		case sel.Type == "systemd":
			unit = true
		case sel.Type == "unix" && (hasKey(sel.Value, "uid") || hasKey(sel.Value, "gid")):
		default:
			return false
		}
	}
	return unit
}

func hasKey(value, key string) bool {
	return len(value) > len(key) && value[:len(key)] == key && value[len(key)] == ':'
}

// PolicyChanged forgets every refusal: at once by their generation, then their entries.
func (b *Backend) PolicyChanged() {
	b.beat.Lock()
	b.agent.Generation++
	b.changed = time.Now()
	b.beat.Unlock()
	if err := b.heartbeat(); err != nil {
		b.log.Error("refusals of the old policy stay in the kernel", "error", err)
	}
	if err := sweepTable(b.inst.Maps.RfDenies, func(bpf.DenyKey) bool { return true }); err != nil {
		b.log.Warn("void refusals not cleared", "error", err)
	}
}

// Listens is how often a listening socket has come or gone in a scope; equal
// counts mean that nothing has changed in between. It costs no system call.
func (b *Backend) Listens() uint64 { return b.inst.Listens() }

// ExecID is the exec id of a process after its latest execve, or zero where none was seen.
func (b *Backend) ExecID(p workload.Process) (uint64, error) {
	return b.inst.ExecID(p.PID, p.StartTime)
}
