package agent

import (
	"context"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy"
)

// aloneLimit bounds the look at who listens on a port.
const aloneLimit = time.Second

// coveringDecider lets connections of a host scope pass undecided when the
// programs on this host turn out not to be covered. The kernel leaves most of
// them alone already; those that arrive here were quicker than its tables, or are in a
// cgroup of which the rules take all that is below it.
type coveringDecider struct {
	proxy.Decider
	a *Agent
}

func (d coveringDecider) Open(c authz.Connection) (authz.Session, error) {
	if d.a.uncovered(c) {
		return uncoveredSession{c.ID}, nil
	}
	return d.Decider.Open(c)
}

// uncovered reports whether all programs of this host that a connection concerns
// are ones that the host scope leaves alone. What cannot be told counts as covered:
// who is covered is protected from who is not.
func (a *Agent) uncovered(c authz.Connection) bool {
	sc := a.partOfHost(c.Scope)
	if sc == nil {
		return false
	}
	caller := c.Side == authz.Ingress || c.Source.PID != 0 && sc.cover.leavesAlone(c.Source)
	return caller && (c.Side == authz.Egress || a.servedAlone(sc, c.Destination.Addr))
}

// partOfHost returns a host scope of which a part is left alone, or nil.
func (a *Agent) partOfHost(name string) *scope {
	sc, err := a.scopeNamed(name)
	if err != nil || sc.cover == nil || sc.cover.all() {
		return nil
	}
	return sc
}

// leavesAlone reads the cgroup of the calling process. The pid is not proof: its
// process may have ended and another have got the number. So what is there now
// must be the unit and the program that were found when it connected.
func (c *cover) leavesAlone(caller authz.Peer) bool {
	h, err := proc.New("").Open(caller.PID)
	if err != nil {
		return false
	}
	defer h.Close()
	cg, err := h.Cgroups()
	if err != nil || c.covers(cg.V2) || c.unitName(cg.V2) != caller.Unit {
		return false
	}
	exe, err := h.Exe()
	return err == nil && exe.Path == caller.Exe
}

// unitName calls the unit of a cgroup as identities do.
func (c *cover) unitName(p string) string {
	if u := c.tree.Unit(p); u.Kind == cgroup.Service || u.Kind == cgroup.User {
		return u.String()
	}
	return ""
}

// describe says what a caller is that has no identity, if it was not covered when
// it made its socket. Otherwise it says nothing.
func (c *cover) describe(ev workload.Evidence) (unit, exe string) {
	if ev.PID == 0 || c.coversID(ev.CgroupID) {
		return "", ""
	}
	h, err := proc.New("").Open(ev.PID)
	if err != nil {
		return "", ""
	}
	defer h.Close()
	st, err1 := h.Stat()
	file, err2 := h.Exe()
	p, err3 := c.tree.Path(ev.CgroupID)
	if err1 != nil || err2 != nil || err3 != nil || !st.Same(ev.Process) {
		return "", ""
	}
	return c.unitName(p), file.Path
}

// servedAlone reports whether nobody is covered of those who listen at an address.
// It looks anew each time: a port changes hands faster than a table of it.
func (a *Agent) servedAlone(sc *scope, addr netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(context.Background(), aloneLimit)
	defer cancel()
	conn, err := sockdiag.Open(sc.ns)
	if err != nil {
		return false
	}
	defer conn.Close()
	listening, err := conn.ListenersOn(ctx, addr.Port())
	if err != nil {
		return false
	}
	found := false
	for _, s := range listening {
		if !mayTake(s, addr.Addr()) {
			continue
		}
		if found = true; sc.cover.coversID(a.homeOf(ctx, sc, s)) {
			return false
		}
	}
	return found
}

// mayTake reports whether a listening socket is at an address, or at all of them.
// A wildcard counts beside an exact address: it is covered more often than need be.
func mayTake(s sockdiag.Socket, to netip.Addr) bool {
	at := s.Source.Addr()
	if !at.IsUnspecified() {
		return at == to
	}
	return at.Is4() == to.Is4() || s.Family == unix.AF_INET6 && !s.V6Only
}

// homeOf is the cgroup of a listening socket; before Linux 5.9, where the socket
// does not tell, that of the process which holds it. Zero when it cannot be told.
func (a *Agent) homeOf(ctx context.Context, sc *scope, s sockdiag.Socket) uint64 {
	if s.CgroupID != 0 {
		return s.CgroupID
	}
	who, err := a.attestor.Owner(ctx, sc.ns, s.Source)
	if err != nil {
		return 0
	}
	return who.Evidence.CgroupID
}

// uncoveredSession permits everything and records nothing.
type uncoveredSession struct{ id authz.ID }

func (s uncoveredSession) decision() authz.Decision {
	return authz.Decision{ID: s.id, Effect: authz.Permit, Reason: "not covered by the scope"}
}
func (s uncoveredSession) Connect() (authz.Decision, error)               { return s.decision(), nil }
func (s uncoveredSession) Request(*authz.Request) (authz.Decision, error) { return s.decision(), nil }
func (s uncoveredSession) HTTPOnly() bool                                 { return false }
func (s uncoveredSession) Refuse(string) authz.Decision                   { return s.decision() }
