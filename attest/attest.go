// Package attest names workloads: evidence about a process becomes selectors,
// selectors match a registration entry, and the entry, or else a template, gives
// the SPIFFE ID.
//
// What an identity means. One of a systemd service means that PID 1 put the
// process there. One of an executable means that this file is executed, not
// that it does only what its author meant: whoever runs curl is curl, with any
// LD_PRELOAD and any arguments; a script is its interpreter (python3.11); a
// program started through the dynamic loader is the loader. Policy that must
// tell users apart needs a registration entry with unix:uid.
//
// The invariants: uid and cgroup are those of the connection's evidence and
// never come from a cache; a process that is not provably the image that the
// evidence speaks of is [workload.ErrGone]; when two answers are possible there
// is none. Every failure means that the connection has no identity.
//
// What it needs: the host's /proc and mount namespace, CAP_SYS_PTRACE (to read
// other users' /proc/PID/exe and fd), CAP_DAC_READ_SEARCH, CAP_NET_ADMIN.
package attest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
)

// Executables says which executables the template names.
type Executables string

const (
	// ExecutablesRootOwned names executables on paths that only root can change:
	// the file and every directory above it owned by root and writable for nobody
	// else. Others have no identity. The default, and what enforcing scopes need.
	ExecutablesRootOwned Executables = "root-owned"
	// ExecutablesAny also names the others, with a suffix that no root-owned one
	// has, so that watching shows them and a policy never takes them for the real ones.
	ExecutablesAny Executables = "any"
)

// Config is what an Attestor works by. Zero optional fields mean the default.
type Config struct {
	// TrustDomain is that of every ID given. Required.
	TrustDomain spiffeid.TrustDomain
	// Host is the group part of templated IDs; default the host's name. Any
	// characters: it is escaped like workload names.
	Host string
	// Entries are the registration entries; order means nothing.
	Entries []Entry
	// Executables defaults to ExecutablesRootOwned.
	Executables Executables
	// UnitRoots are cgroup v2 paths whose direct children called NAME.service are
	// services as if systemd had started them. Only root may be able to make
	// cgroups there. None by default.
	UnitRoots []string
	// ExecID, if given, tells a process's exec id after its latest execve, or zero
	// where none was seen. With it an execve between connect and attestation is
	// noticed; without it, the image that is found is taken for the one that connected.
	ExecID func(workload.Process) (uint64, error)
	// Listens, if given, counts how often a listening socket has come or gone in any
	// namespace that Owner is asked about. With it, what was found out about an owner
	// is believed for a second without looking again, as long as the count stays.
	Listens func() uint64
	// CacheSize bounds each of the caches; default 8192 images.
	CacheSize int

	// Places, for hosts that are laid out in another way: the /proc mount, the
	// cgroup v2 mount (found by itself when empty), the unit file directories
	// and the account files.
	Proc, CgroupMount string
	UnitDirs          []string
	Passwd, Group     string
}

// Attestor names workloads. It is safe for concurrent use. Its settings never
// change: make a new one for new entries.
type Attestor struct {
	// Set by New, then read-only.
	trustDomain spiffeid.TrustDomain
	host        string // escaped
	entries     []entry
	needs       needs
	executables Executables
	execID      func(workload.Process) (uint64, error)
	listens     func() uint64
	quietFor    time.Duration // quietAge; tests have more time
	proc        *proc.FS
	tree        *cgroup.Tree // nil on hosts without cgroup v2
	named       bool         // systemd also keeps units in its own v1 hierarchy
	mountNS     []uint64     // where only root mounts: PID 1's mount namespace and our own
	ownedTop    string       // directories above are not judged; "/" outside of tests
	self        uint32       // our own pid in proc

	users, groups *accounts
	hasher        *proc.Hasher
	units         *units

	images  *lru[imageKey, *image]
	results *lru[resultKey, result]

	owners *lru[ownerKey, *owner]
	conns  *lru[uint64, *sockdiag.Conn] // by inode of the network namespace, which they keep alive
	turn   chan struct{}                // held by the one that walks descriptor tables
}

// defaultCache is in images. One takes about a kilobyte.
const defaultCache = 8192

// maxConns bounds the open netlink sockets, one per network namespace asked.
const maxConns = 1024

// New checks the settings and looks at the host's layout. It starts nothing.
func New(cfg Config) (*Attestor, error) {
	a, err := checked(cfg)
	if err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	if err := a.findCgroups(cfg); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	a.units = newUnits(cfg.UnitDirs, a.tree)
	if self, err := a.proc.Self(); err == nil {
		a.self = self
	}
	for _, pid := range []uint32{1, a.self} {
		if ns, ok := a.mountNamespace(pid); ok {
			a.mountNS = append(a.mountNS, ns)
		}
	}
	return a, nil
}

func (a *Attestor) mountNamespace(pid uint32) (uint64, bool) {
	h, err := a.proc.Open(pid)
	if err != nil {
		return 0, false
	}
	defer h.Close()
	ns, err := h.Namespace("mnt")
	return ns, err == nil
}

func checked(cfg Config) (*Attestor, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("no trust domain")
	}
	if cfg.Host == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, err
		}
		cfg.Host = name
	}
	switch cfg.Executables {
	case "":
		cfg.Executables = ExecutablesRootOwned
	case ExecutablesRootOwned, ExecutablesAny:
	default:
		return nil, fmt.Errorf("executables %q: want %q or %q", cfg.Executables, ExecutablesRootOwned, ExecutablesAny)
	}
	if cfg.CacheSize <= 0 {
		cfg.CacheSize = defaultCache
	}
	entries, want, err := checkEntries(cfg.TrustDomain, cfg.Entries)
	if err != nil {
		return nil, err
	}
	a := &Attestor{
		trustDomain: cfg.TrustDomain, host: Escape(cfg.Host), entries: entries, needs: want,
		executables: cfg.Executables, execID: cfg.ExecID, listens: cfg.Listens, quietFor: quietAge,
		proc: proc.New(cfg.Proc), ownedTop: "/", self: uint32(os.Getpid()),
		users:   &accounts{path: or(cfg.Passwd, "/etc/passwd")},
		groups:  &accounts{path: or(cfg.Group, "/etc/group")},
		hasher:  proc.NewHasher(cfg.CacheSize),
		images:  newLRU[imageKey, *image](cfg.CacheSize),
		results: newLRU[resultKey, result](cfg.CacheSize),
		owners:  newLRU[ownerKey, *owner](cfg.CacheSize),
		conns:   newLRU[uint64, *sockdiag.Conn](maxConns),
		turn:    make(chan struct{}, 1),
	}
	_, err = a.template("x") // a host name that makes no ID is found out now
	return a, err
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}

// findCgroups learns which hierarchies tell units.
func (a *Attestor) findCgroups(cfg Config) error {
	tree, err := cgroup.Open(cgroup.Config{Mount: cfg.CgroupMount, UnitRoots: cfg.UnitRoots})
	switch {
	case err == nil:
		a.tree = tree
	case !errors.Is(err, cgroup.ErrNotFound) || len(cfg.UnitRoots) > 0 || cfg.CgroupMount != "":
		return err
	}
	h, err := a.proc.Open(1)
	if err != nil {
		return nil // no pid 1 to be seen: its hierarchy cannot be told either
	}
	defer h.Close()
	st, err := h.Stat()
	if err != nil {
		return err
	}
	cg, err := h.Cgroups()
	if err != nil {
		return fmt.Errorf("cgroups of process 1: %w", err)
	}
	// Other init programs leave a name=systemd hierarchy, which container tools
	// mount, to whoever wants it.
	a.named = cg.Systemd != "" && st.Comm == "systemd"
	return nil
}

// Initial reports whether the agent sees pids and cgroups as the host does;
// otherwise evidence from hooks cannot be used.
func (a *Attestor) Initial() (pid, cgroup bool) { return a.proc.Initial() }

// Close lets go of the network namespaces that were asked. It may be called twice.
func (a *Attestor) Close() error {
	for _, c := range a.conns.removeIf(func(uint64) bool { return true }) {
		c.Close()
	}
	return nil
}

// Identify names the process that the evidence speaks of.
//
// Errors: [workload.ErrGone] when the process ended or is another image by now,
// [workload.ErrUnknown] when neither an entry nor the template names it,
// [workload.ErrAmbiguous] when two entries do. The Selectors of the answer
// are shared: do not change them.
func (a *Attestor) Identify(ctx context.Context, ev workload.Evidence) (workload.Identity, error) {
	key, cacheable := a.resultKey(ev)
	if cacheable {
		if r, ok := a.results.get(key); ok && r.current(a.units) {
			r.identity.Evidence = ev
			return r.identity, nil
		}
	}
	f, err := a.look(ctx, ev, a.needs)
	if err != nil {
		return workload.Identity{}, fmt.Errorf("attest process %d: %w", ev.PID, err)
	}
	id, err := f.decide(a)
	if err != nil {
		return workload.Identity{}, fmt.Errorf("attest process %d: %w", ev.PID, err)
	}
	if cacheable {
		a.results.put(key, result{identity: id, program: f.program, clash: f.clash})
	}
	return id, nil
}

// resultKey holds all that an identity depends on besides settings and the
// units that exist. Supplementary groups and systemd's v1 hierarchy belong to
// the process and can change: where they count, results are not kept.
type resultKey struct {
	imageKey
	uid, gid uint32
	cgroup   uint64
}

type result struct {
	identity workload.Identity
	program  string // the executable's name, if the ID was made from it
	clash    bool   // whether a service had that name
}

func (r *result) current(u *units) bool { return r.program == "" || u.exists(r.program) == r.clash }

func (a *Attestor) resultKey(ev workload.Evidence) (resultKey, bool) {
	ok := ev.Source == workload.SourceHook && ev.ExecID != 0 && ev.CgroupID != 0 &&
		a.tree != nil && !a.named && !a.needs.supplementary && !a.needs.supplementaryNames
	return resultKey{keyOf(ev.Process), ev.UID, ev.GID, ev.CgroupID}, ok
}
