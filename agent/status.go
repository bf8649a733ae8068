package agent

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/admin"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/policy/authz"
)

// Status tells everything, read now.
func (a *Agent) Status(ctx context.Context) admin.Status {
	s := admin.Status{
		Version: a.version, Instance: a.settings.Instance, PID: os.Getpid(), Started: a.started,
		Host: a.settings.Host, TrustDomain: a.settings.TrustDomain.Name(),
		Capture: a.backend.Name(), CaptureReason: a.backendReason,
		Ready: a.Ready() == nil, Problems: []string{}, Counters: map[string]int64{},
	}
	for _, sc := range a.scopeList() {
		st := a.scopeStatus(ctx, sc)
		s.Scopes = append(s.Scopes, st)
		s.Workloads = append(s.Workloads, a.workloads(ctx, sc)...)
	}
	a.relayStatus(&s)
	a.policyStatus(&s)
	s.Observations, s.ObservationsForgotten = a.observed.list()
	s.Resources = a.resources(&s)
	return s
}

// scopeList is a copy, sorted by name.
func (a *Agent) scopeList() []*scope {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := make([]*scope, 0, len(a.scopes))
	for _, sc := range a.scopes {
		list = append(list, sc)
	}
	slices.SortFunc(list, func(x, y *scope) int { return strings.Compare(x.settings.Name, y.settings.Name) })
	return list
}

func (a *Agent) scopeStatus(ctx context.Context, sc *scope) admin.Scope {
	a.mu.Lock()
	settings, uncovered, problems := sc.settings, sc.uncovered, slices.Clone(sc.problems)
	a.mu.Unlock()
	st := admin.Scope{
		Name: settings.Name, Path: settings.Path, Host: settings.Host, Cookie: sc.ns.Cookie(),
		Mode: settings.Mode, Loopback: settings.Loopback, Problems: problems,
		Uncovered: a.stillUncovered(ctx, sc, uncovered),
	}
	if settings.Mode != authz.Watch {
		st.Problems = append(st.Problems, a.backend.Verify(settings.Name)...)
		if !sc.addrs.state.Load().loUp {
			st.Problems = append(st.Problems, "the loopback interface is down, so nothing can be redirected: run `ip link set lo up` in the namespace")
		}
		st.Protected = settings.Mode == authz.Enforce && len(st.Problems) == 0 && len(st.Uncovered) == 0
	}
	if st.Problems == nil {
		st.Problems = []string{}
	}
	if st.Uncovered == nil {
		st.Uncovered = []admin.Uncovered{}
	}
	return st
}

// workloads lists who listens in a scope, one row for each identity.
func (a *Agent) workloads(ctx context.Context, sc *scope) []admin.Workload {
	socks, err := sockdiag.Listeners(sc.ns)
	if err != nil {
		return nil
	}
	rows := map[string]*admin.Workload{}
	var order []string
	for _, s := range socks {
		if s.CgroupID == a.leaf && a.leaf != 0 || agentPort(s.Source.Port()) {
			continue
		}
		who, err := a.attestor.Owner(ctx, sc.ns, s.Source)
		w := admin.Workload{Scope: sc.settings.Name, Name: who.Name, Unit: who.Unit, Exe: who.Exe, PID: who.Evidence.PID}
		if !who.ID.IsZero() {
			w.ID = who.ID.String()
		}
		key := w.ID
		if err != nil {
			w.Problem, key = err.Error(), s.Source.String()
			w.Name = or(w.Name, s.Source.String())
		}
		if rows[key] == nil {
			rows[key] = &w
			order = append(order, key)
		}
		if at := s.Source.String(); !slices.Contains(rows[key].Listening, at) {
			rows[key].Listening = append(rows[key].Listening, at)
		}
	}
	list := make([]admin.Workload, 0, len(order))
	for _, st := range a.svids.Status() {
		if w := rows[st.ID.String()]; w != nil && !st.NotAfter.IsZero() {
			at := st.NotAfter
			w.SVIDExpires = &at
		}
	}
	for _, key := range order {
		list = append(list, *rows[key])
	}
	return list
}

// resources measures what the agent uses.
func (a *Agent) resources(s *admin.Status) admin.Resources {
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	r := admin.Resources{
		Descriptors: descriptors(), Goroutines: runtime.NumGoroutine(),
		HeapBytes: mem.HeapAlloc, RSSBytes: residentBytes(),
		Connections: len(s.Connections), Tables: a.backend.Tables(),
	}
	for _, p := range s.Peers {
		r.Tunnels += p.Tunnels
		r.Streams += p.Streams
	}
	if dir, err := os.ReadDir("/proc/self/task"); err == nil {
		r.Threads = len(dir)
	}
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		r.DescriptorLimit = lim.Cur
	}
	return r
}

// Collect frees what can be freed, so that what is left is what is used.
func (a *Agent) Collect() admin.Resources {
	debug.FreeOSMemory()
	return a.resources(&admin.Status{})
}

func descriptors() int {
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(dir) - 1 // without the one that is reading
}

// residentBytes is VmRSS, from /proc/self/statm (proc_pid_statm(5)).
func residentBytes() uint64 {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data))
	if len(fields) < 2 {
		return 0
	}
	var pages uint64
	for _, c := range fields[1] {
		pages = pages*10 + uint64(c-'0')
	}
	return pages * uint64(os.Getpagesize())
}
