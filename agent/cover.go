package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/cni/netns"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy"
)

// cover says which cgroups of a host scope are covered, and keeps the kernel's
// table of them fresh. A cgroup that is too new to be in the table is captured,
// and let through by [coveringDecider]: nobody escapes by being quick.
type cover struct {
	scope    string
	settings ScopeSettings
	tree     *cgroup.Tree
	leaf     string // the agent's own, never covered
	backend  capture.Backend
	log      *slog.Logger
	watcher  *fsnotify.Watcher

	writing sync.Mutex            // held from looking at the tree to writing the table, so that an old look is not written last
	failed  atomic.Pointer[error] // of the latest refresh; nil or a nil error is fine
}

// settle waits for the rest of a burst of changes: a service manager makes
// several cgroups for one service.
const settle = 50 * time.Millisecond

func (a *Agent) newCover(s ScopeSettings) (*cover, error) {
	tree, err := cgroup.Open(cgroup.Config{UnitRoots: a.settings.UnitRoots})
	if err != nil {
		return nil, fmt.Errorf("host scope: %w", err)
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("follow cgroups: %w", err)
	}
	return &cover{scope: s.Name, settings: s, tree: tree, leaf: a.leafPath, backend: a.backend, log: a.log, watcher: w}, nil
}

// covers decides for one cgroup path below the v2 root.
func (c *cover) covers(p string) bool {
	if p == c.leaf || strings.HasPrefix(p, c.leaf+"/") {
		return false
	}
	unit := c.tree.Unit(p).Name
	if matchAny(c.settings.ExceptUnits, unit) {
		return false
	}
	if len(c.settings.Cgroups) == 0 && len(c.settings.Units) == 0 {
		return true
	}
	if matchAny(c.settings.Units, unit) {
		return true
	}
	// A pattern covers what is below a matching cgroup too, as children do in cgroups.
	for ; p != "/" && p != "."; p = path.Dir(p) {
		if matchAny(c.settings.Cgroups, p) {
			return true
		}
	}
	return matchAny(c.settings.Cgroups, "/")
}

func matchAny(patterns []string, name string) bool {
	if name == "" {
		return false
	}
	for _, p := range patterns {
		if ok, _ := path.Match(p, name); ok { // patterns were checked with the settings
			return true
		}
	}
	return false
}

// all says that nothing of the host is left out, so that no table is needed.
func (c *cover) all() bool {
	return len(c.settings.Cgroups)+len(c.settings.Units)+len(c.settings.ExceptUnits) == 0
}

// coversID decides for a cgroup id. One that cannot be found any more counts as covered.
func (c *cover) coversID(id uint64) bool {
	if c.all() || id == 0 {
		return true
	}
	p, err := c.tree.Path(id)
	return err != nil || c.covers(p)
}

// refresh looks at the tree and writes the table.
func (c *cover) refresh() error {
	c.writing.Lock()
	defer c.writing.Unlock()
	table, err := c.table()
	if err == nil {
		err = c.backend.SetCgroups(c.scope, table)
	}
	c.failed.Store(&err)
	return err
}

// problem says why the table may be behind; empty when it is not.
func (c *cover) problem() string {
	if err := c.failed.Load(); err != nil && *err != nil {
		return "the table of covered cgroups is not up to date, new ones are captured whatever the patterns say: " + (*err).Error()
	}
	return ""
}

// table walks the tree, and follows what is new in it.
func (c *cover) table() ([]capture.Cgroup, error) {
	var table []capture.Cgroup
	root := c.tree.Root()
	err := filepath.WalkDir(root, func(dir string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed while we look
		}
		if err != nil || !d.IsDir() {
			return err
		}
		p := "/" + strings.TrimPrefix(strings.TrimPrefix(dir, root), "/")
		// Followed before it is read, so that no child is made in between unseen.
		if err := c.follow(dir); err != nil {
			return err
		}
		id, err := c.tree.ID(p)
		if errors.Is(err, cgroup.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		table = append(table, capture.Cgroup{ID: id, Path: p, Covered: c.covers(p)})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("walk the cgroup tree: %w", err)
	}
	return table, nil
}

func (c *cover) follow(dir string) error {
	err := c.watcher.Add(dir)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("follow cgroup %s: the limit of inotify watches is reached: raise fs.inotify.max_user_watches", dir)
	default:
		return fmt.Errorf("follow cgroup %s: %w", dir, err)
	}
}

// run keeps the table fresh until ctx ends.
func (c *cover) run(ctx context.Context) {
	defer c.watcher.Close()
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-c.watcher.Events:
			if !ok {
				return
			}
			// Files of a cgroup change all the time; its children come and go as directories.
			if e.Has(fsnotify.Create) || e.Has(fsnotify.Remove) {
				timer.Reset(settle)
			}
		case err, ok := <-c.watcher.Errors:
			if !ok {
				return
			}
			c.log.Warn("following cgroups", "scope", c.scope, "err", err)
			timer.Reset(settle) // an overflow lost something: look at all of it
		case <-timer.C:
			if err := c.refresh(); err != nil {
				c.log.Error("cgroups of a host scope are not up to date", "scope", c.scope, "err", err)
			}
		}
	}
}

// coveringDecider lets connections of a host scope pass undecided when the
// program on this host turns out not to be covered. The kernel leaves most of
// them alone already; those that arrive here were quicker than its tables.
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
// are ones that the host scope leaves alone. What cannot be told counts as covered.
func (a *Agent) uncovered(c authz.Connection) bool {
	sc, err := a.scopeNamed(c.Scope)
	if err != nil || sc.cover == nil || sc.cover.all() {
		return false
	}
	caller := c.Side == authz.Ingress || c.Source.PID != 0 && sc.cover.leavesAlone(c.Source)
	service := c.Side == authz.Egress || sc.cover.servedAlone(sc.ns, c.Destination.Addr)
	return caller && service
}

// servedAlone reports whether everybody who listens at an address is uncovered.
// It looks anew each time: a port changes hands faster than a table of it.
func (c *cover) servedAlone(ns *netns.Handle, at netip.AddrPort) bool {
	conn, err := sockdiag.Open(ns)
	if err != nil {
		return false
	}
	defer conn.Close()
	listeners, err := conn.ListenersOn(context.Background(), at.Port())
	if err != nil {
		return false
	}
	found := false
	for _, l := range listeners {
		if on := l.Source.Addr(); on != at.Addr() && !on.IsUnspecified() {
			continue
		}
		p, err := c.tree.Path(l.CgroupID)
		if l.CgroupID == 0 || err != nil || c.covers(p) {
			return false
		}
		found = true
	}
	return found
}

// leavesAlone reads the cgroup of the calling process. The pid is not proof: its
// process may have ended and another have got the number. So what is there now
// must be the unit and the program that were attested.
func (c *cover) leavesAlone(caller authz.Peer) bool {
	h, err := proc.New("").Open(caller.PID)
	if err != nil {
		return false
	}
	defer h.Close()
	cg, err := h.Cgroups()
	if err != nil || c.covers(cg.V2) || c.tree.Unit(cg.V2).Name != caller.Unit {
		return false
	}
	exe, err := h.Exe()
	return err == nil && exe.Path == caller.Exe
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
