package iptables

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/capture/observe"
	"ringfence.dev/agent/capture/outgoing"
	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/workload"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/proxy/flow"
)

var (
	// ErrLeaf reports that the agent does not run in a cgroup leaf of its own,
	// without which its connections could not be told from the workloads'.
	ErrLeaf   = errors.New("iptables: the agent needs a cgroup v2 leaf of its own")
	errClosed = errors.New("iptables: back end is closed")
)

// Config is what the back end is made of. The zero value is right on a host.
type Config struct {
	// Leaf is the agent's own cgroup, a path below the cgroup v2 root. All of the
	// agent's sockets, listeners included, must have been made in it. Empty means
	// the cgroup this process is in.
	Leaf string
	// Variant forces a variant of iptables; empty means the one in use.
	Variant fw.Variant
	// Guard holds the scopes' last wills; nil means that a dead agent's scopes
	// are refused in any mode, and a hung agent's connections hang.
	Guard *Guard
	Log   *slog.Logger // nil discards
}

// Backend implements [capture.Backend] with packet filter rules.
type Backend struct {
	// Set by New, then read-only.
	leaf   string
	leafID uint64
	mark   uint32
	tools  *fw.Tools
	tree   *cgroup.Tree
	procs  *proc.FS
	watch  *observe.Backend
	guard  *Guard
	log    *slog.Logger

	callers *callers // has a lock of its own

	repairs atomic.Uint64

	mu     sync.Mutex // held means that scopes does not change
	scopes map[string]*scope
	closed bool
}

var _ capture.Backend = (*Backend)(nil)

// New finds the iptables programs and the agent's cgroup. Nothing is installed
// yet. It returns [ErrLeaf] when the agent is in the root cgroup, and
// [fw.ErrNotFound] without iptables programs.
func New(ctx context.Context, cfg Config) (*Backend, error) {
	b := &Backend{procs: proc.New(""), watch: observe.New(), guard: cfg.Guard, log: cfg.Log, scopes: map[string]*scope{}}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if b.tools, err = fw.Find(ctx); err != nil {
		return nil, err
	}
	if cfg.Variant != "" {
		if b.tools, err = b.tools.Only(cfg.Variant); err != nil {
			return nil, err
		}
	}
	if err := b.findLeaf(cfg.Leaf); err != nil {
		return nil, err
	}
	b.callers = newCallers(b.procs, b.tree)
	if b.mark, err = randomMark(); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *Backend) findLeaf(leaf string) (err error) {
	if b.tree, err = cgroup.Open(cgroup.Config{}); err != nil {
		return fmt.Errorf("%w: %w", ErrLeaf, err)
	}
	if leaf == "" {
		if leaf, err = ownCgroup(); err != nil {
			return err
		}
	}
	b.leaf = clean(leaf)
	if b.leaf == "/" {
		return fmt.Errorf("%w: it is in the root cgroup", ErrLeaf)
	}
	if b.leafID, err = b.tree.ID(b.leaf); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrLeaf, b.leaf, err)
	}
	return nil
}

func ownCgroup() (string, error) {
	h, err := proc.New("").Open(uint32(unix.Getpid()))
	if err != nil {
		return "", err
	}
	defer h.Close()
	cg, err := h.Cgroups()
	if err != nil {
		return "", err
	}
	return cg.V2, nil
}

// randomMark is never zero, which is every other packet's mark.
func randomMark() (uint32, error) {
	var b [4]byte
	for {
		if _, err := rand.Read(b[:]); err != nil {
			return 0, err
		}
		if m := binary.NativeEndian.Uint32(b[:]); m != 0 {
			return m, nil
		}
	}
}

// Name is "iptables".
func (b *Backend) Name() string { return "iptables" }

// Add makes a scope live. What a former agent left in the namespace is replaced
// in the same step, in watch mode by nothing. On error no rule of ours stays.
func (b *Backend) Add(ctx context.Context, s capture.Scope) error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return errClosed
	}
	if _, ok := b.scopes[s.Name]; ok {
		b.mu.Unlock()
		return fmt.Errorf("iptables: scope %s is there already", s.Name)
	}
	sc := &scope{b: b, name: s.Name}
	b.scopes[s.Name] = sc
	// Locked before anybody can find it half made.
	sc.mu.Lock()
	b.mu.Unlock()
	err := sc.openLocked(ctx, s)
	sc.mu.Unlock()
	if err != nil {
		b.forget(sc)
		return fmt.Errorf("capture scope %s: %w", s.Name, err)
	}
	return nil
}

func (b *Backend) forget(sc *scope) {
	b.mu.Lock()
	if b.scopes[sc.name] == sc {
		delete(b.scopes, sc.name)
	}
	b.mu.Unlock()
}

// SetMode changes a scope's mode, loopback setting and behaviour without agent.
// On error the scope is as it was before, or, where that cannot be restored either, Verify says so.
func (b *Backend) SetMode(ctx context.Context, s capture.Scope) error {
	sc, err := b.scope(s.Name)
	if err != nil {
		return err
	}
	sc.mu.Lock()
	defer sc.mu.Unlock()
	return sc.setModeLocked(ctx, s)
}

// SetCgroups replaces a host scope's table. Rules are rewritten only when they
// come out different.
func (b *Backend) SetCgroups(name string, cgroups []capture.Cgroup) error {
	sc, err := b.scope(name)
	if err != nil {
		return err
	}
	sc.mu.Lock()
	defer sc.mu.Unlock()
	return sc.setCgroupsLocked(context.Background(), cgroups)
}

// Remove takes a scope's rules away.
func (b *Backend) Remove(ctx context.Context, name string) error {
	sc, err := b.scope(name)
	if errors.Is(err, capture.ErrNoScope) {
		return nil
	}
	sc.mu.Lock()
	err = sc.closeLocked(ctx, true)
	sc.mu.Unlock()
	if err == nil {
		b.forget(sc)
	}
	return err
}

// BeforeConnect binds the agent's dial to the caller's device and source address.
// Nothing has to be exempted: the socket is of the agent's cgroup. The server sees the agent's
// address; client is not used.
func (b *Backend) BeforeConnect(_ string, fd int, to, client netip.AddrPort, f flow.Flow) error {
	if client.IsValid() {
		return nil
	}
	return outgoing.BindLike(fd, to.Addr(), f)
}

// Refused does nothing: rules cannot tell one caller's destination from another's.
func (b *Backend) Refused(string, flow.Flow, workload.Identity) {}

// PolicyChanged does nothing: no refusal was pushed down.
func (b *Backend) PolicyChanged() {}

// Close lets go. With detach all rules are removed, errors of single scopes
// notwithstanding. Without, those of scopes that shall be closed without an agent
// stay, and refuse, until the next agent takes the namespaces over; the others
// pass untouched.
func (b *Backend) Close(detach bool) error {
	b.mu.Lock()
	scopes := b.scopes
	b.scopes, b.closed = map[string]*scope{}, true
	b.mu.Unlock()
	var errs []error
	for _, sc := range scopes {
		sc.mu.Lock()
		errs = append(errs, sc.closeLocked(context.Background(), detach || !sc.closedWhenDownLocked()))
		sc.mu.Unlock()
	}
	b.callers.close()
	errs = append(errs, b.watch.Close(detach))
	return errors.Join(errs...)
}

func (b *Backend) scope(name string) (*scope, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	sc, ok := b.scopes[name]
	if !ok {
		return nil, fmt.Errorf("scope %s: %w", name, capture.ErrNoScope)
	}
	return sc, nil
}

// ListenControl sets what the rules need on a listening socket of the agent
// before it is bound: IP_TRANSPARENT, without which TPROXY hands it nothing. It
// is given the address family and the descriptor, and needs CAP_NET_ADMIN or
// CAP_NET_RAW. Outbound and inbound listeners belong on 127.0.0.1 and ::1, where
// nobody reaches them from the network; the tunnel listener on any address.
func ListenControl(_ int, family, fd int) error {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if family == unix.AF_INET6 {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return fmt.Errorf("make the listener transparent: %w", err)
	}
	return nil
}
