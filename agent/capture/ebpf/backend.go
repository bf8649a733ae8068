// Package ebpf is the capture back end on cgroup hooks, sockops and sk_lookup.
// It fills the tables of package bpf from scopes and reads notes and events out
// of them; what the hooks do with the tables is said in bpf/headers.
//
// The invariant: a namespace is captured exactly while its cookie is in the
// scope table, which is written last when a scope is added and first when it is
// removed. What a previous agent left live stays live until this one has put
// its own word in its place, or has called [Backend.Prune].
package ebpf

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/bpf"
)

var _ capture.Backend = (*Backend)(nil)

const (
	beatEvery    = 250 * time.Millisecond
	beatLimit    = time.Second
	reclaimEvery = 15 * time.Second
)

// Config says which instance to run. Zero optional fields mean the default.
type Config struct {
	// Instance names this agent among those on the same kernel. Required; a-z, 0-9, - and _.
	Instance string
	// PinRoot is a directory on bpffs. Zero means /sys/fs/bpf/ringfence.
	PinRoot string
	// CgroupRoot is the mount of the whole cgroup v2 tree. Zero means: found in mountinfo.
	CgroupRoot string
	// AgentCgroup is the agent's own leaf, the loop guard: a path (absolute, or
	// below CgroupRoot) or a cgroup id in decimal. Required; see [JoinLeaf].
	AgentCgroup string
	// HeartbeatLimit is how long the agent may be silent before the hooks take
	// it for dead. Zero means 1 s; the agent beats every 250 ms.
	HeartbeatLimit time.Duration
	// Sizes overrides the number of entries of kernel tables, by name ("rf_notes": 4096).
	Sizes map[string]uint32
	// Log gets what an operator should know. Nil means none.
	Log *slog.Logger
}

// Backend implements [capture.Backend].
type Backend struct {
	// Set by New, then read-only.
	inst *bpf.Instance
	conf Config
	log  *slog.Logger
	host uint64 // cgroup id of the agent

	// mu held means no scope comes or goes, and nobody else writes the tables of scopes.
	mu    sync.Mutex
	epoll int // of the route sockets; -1 after Close

	// index is for the readers: names and cookies to scopes.
	index  sync.RWMutex
	byName map[string]*scope
	byNS   map[uint64]*scope

	// beat guards this instance's record in the kernel.
	beat    sync.Mutex
	agent   bpf.Agent
	changed time.Time // when policy changed last; zero for never
}

// New loads and attaches the programs, or takes over those that a previous agent
// of the instance left. Nothing is captured before [Backend.Add], and nothing
// beats before [Backend.Run]. A missing kernel feature is a [*bpf.FeatureError].
func New(cfg Config) (*Backend, error) {
	if cfg.CgroupRoot == "" {
		root, err := bpf.CgroupRoot()
		if err != nil {
			return nil, err
		}
		cfg.CgroupRoot = root
	}
	if cfg.HeartbeatLimit == 0 {
		cfg.HeartbeatLimit = beatLimit
	}
	if cfg.HeartbeatLimit < 2*beatEvery {
		return nil, fmt.Errorf("heartbeat limit %s is below two beats of %s", cfg.HeartbeatLimit, beatEvery)
	}
	own, err := agentCgroup(cfg.CgroupRoot, cfg.AgentCgroup)
	if err != nil {
		return nil, err
	}
	b := &Backend{conf: cfg, log: cfg.Log, host: own, byName: map[string]*scope{}, byNS: map[uint64]*scope{}}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	b.inst, err = bpf.Open(bpf.Options{Instance: cfg.Instance, PinRoot: cfg.PinRoot, CgroupRoot: cfg.CgroupRoot, Sizes: cfg.Sizes})
	if err != nil {
		return nil, err
	}
	if b.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		b.inst.Close()
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := b.enrol(); err != nil {
		b.Close(false)
		return nil, err
	}
	return b, nil
}

// agentCgroup reads the setting: an id or a directory. The root itself would make every process the agent.
func agentCgroup(root, setting string) (uint64, error) {
	if setting == "" {
		return 0, errors.New("capture: the agent's cgroup is not set; without it the agent would capture itself")
	}
	id, err := strconv.ParseUint(setting, 10, 64)
	if err != nil {
		dir := setting
		if !filepath.IsAbs(dir) {
			dir = filepath.Join(root, dir)
		}
		if id, err = CgroupID(dir); err != nil {
			return 0, fmt.Errorf("agent's cgroup: %w", err)
		}
	}
	whole, err := CgroupID(root)
	if err != nil {
		return 0, fmt.Errorf("cgroup root: %w", err)
	}
	if id == 0 || id == whole {
		return 0, errors.New("capture: the agent's cgroup must be a leaf of its own, not the root")
	}
	return id, nil
}

// enrol puts this agent's record in the place of its predecessor's. The policy generation goes on, since the
// refusals that are still in the table were for another policy.
func (b *Backend) enrol() error {
	var before bpf.Agent
	if err := b.inst.Maps.RfAgent.Lookup(uint32(0), &before); err != nil {
		return fmt.Errorf("read agent record: %w", err)
	}
	b.beat.Lock()
	b.agent = bpf.Agent{Limit: uint64(b.conf.HeartbeatLimit), Cgroup: b.host, Generation: before.Generation + 1}
	b.beat.Unlock()
	return b.heartbeat()
}

// heartbeat tells the hooks that the agent lives.
func (b *Backend) heartbeat() error {
	b.beat.Lock()
	defer b.beat.Unlock()
	b.agent.Heartbeat = monotonic()
	if err := b.inst.Maps.RfAgent.Put(uint32(0), &b.agent); err != nil {
		return fmt.Errorf("write heartbeat: %w", err)
	}
	return nil
}

// monotonic is the clock of bpf_ktime_get_ns.
func monotonic() uint64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0
	}
	return uint64(ts.Nano())
}

// Name is "ebpf".
func (b *Backend) Name() string { return "ebpf" }

// Instance gives access to probes' answers, counters and checks.
func (b *Backend) Instance() *bpf.Instance { return b.inst }

// Close lets go, after Run has returned. With detach everything the instance has
// pinned is removed; without, it goes on working and finds that the agent is gone.
func (b *Backend) Close(detach bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.index.Lock()
	for _, s := range b.byName {
		s.closeFollower(b.epoll)
	}
	b.byName, b.byNS = map[string]*scope{}, map[uint64]*scope{}
	b.index.Unlock()
	var errs []error
	if b.epoll >= 0 {
		errs = append(errs, os.NewSyscallError("close", unix.Close(b.epoll)))
		b.epoll = -1
	}
	errs = append(errs, b.inst.Close())
	if detach {
		errs = append(errs, bpf.Cleanup(b.conf.PinRoot, b.conf.Instance))
	}
	return errors.Join(errs...)
}
