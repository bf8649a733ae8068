package agent

import (
	"context"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/admin"
	"ringfence.dev/bpf"
	"ringfence.dev/policy/authz"
)

// Status tells everything, read now.
func (a *Agent) Status(ctx context.Context) admin.Status {
	s := admin.Status{
		Version: a.version, Instance: a.settings.Instance, PID: os.Getpid(), Started: a.started,
		Host: a.settings.Host, TrustDomain: a.settings.TrustDomain.Name(),
		Capture: a.backend.Name(), CaptureReason: a.backendReason,
		Ready: a.Ready() == nil, Problems: a.currentProblems(), Counters: map[string]int64{},
	}
	for _, sc := range a.scopeList() {
		st := a.scopeStatus(ctx, sc)
		s.Scopes = append(s.Scopes, st)
		s.Workloads = append(s.Workloads, a.workloads(ctx, sc)...)
	}
	a.mu.Lock()
	s.Problems = append(s.Problems, slices.Sorted(maps.Values(a.missing))...)
	a.mu.Unlock()
	a.relayStatus(&s)
	a.policyStatus(&s)
	a.captureCounters(&s)
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
	settings := sc.settings
	a.mu.Unlock()
	p := a.protection(ctx, sc, verifiedForStatus)
	return admin.Scope{
		Name: settings.Name, Path: settings.Path, Host: settings.Host, Cookie: sc.ns.Cookie(),
		Mode: settings.Mode, Loopback: settings.Loopback, Limits: a.limits(settings),
		Protected: p.whole, Problems: p.problems, Uncovered: p.uncovered,
	}
}

// limits are what the back end cannot do for a scope even when all is well.
func (a *Agent) limits(s ScopeSettings) []string {
	if a.backend.Name() == "observe" {
		return a.backend.Verify(s.Name) // it covers nothing, and says what watching misses
	}
	if b, ok := a.backend.(interface{ Limits(scope string) []string }); ok && s.Mode != authz.Watch {
		return b.Limits(s.Name)
	}
	return nil
}

// captureCounters adds what the back end's kernel side has counted.
func (a *Agent) captureCounters(s *admin.Status) {
	b, ok := a.backend.(interface{ Instance() *bpf.Instance })
	if !ok {
		return
	}
	counts, err := b.Instance().Counters()
	if err != nil {
		s.Problems = append(s.Problems, "the counters of the kernel hooks cannot be read: "+err.Error())
		return
	}
	for reason, n := range counts {
		s.Counters["kernel_"+reason.String()] = int64(n)
	}
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
