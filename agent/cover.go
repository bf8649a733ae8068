package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/cgroup"
)

// cover says which cgroups of a host scope are covered, and keeps the kernel's
// table of them fresh. A cgroup that is too new to be in the table is captured,
// and let through by [coveringDecider]: nobody escapes by being quick. With rules,
// which take a cgroup with all below it, that holds where the cgroup above could
// have covered ones, the root excepted: see [capture.Cgroup].
type cover struct {
	scope     string
	settings  ScopeSettings
	unitRoots []string
	tree      *cgroup.Tree
	leaf      string // the agent's own, never covered
	backend   capture.Backend
	log       *slog.Logger
	watcher   *fsnotify.Watcher

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
	return &cover{scope: s.Name, settings: s, unitRoots: a.settings.UnitRoots, tree: tree, leaf: a.leafPath, backend: a.backend, log: a.log, watcher: w}, nil
}

// makeUnitRoots makes those configured unit roots that are not there yet, so that
// the first unit in one is covered from its first connection on, like all later ones.
// They stay: they belong to whoever makes units there.
func (c *cover) makeUnitRoots() error {
	for _, root := range c.unitRoots {
		if err := os.MkdirAll(filepath.Join(c.tree.Root(), root), 0o755); err != nil {
			return fmt.Errorf("unit root %s: %w", root, err)
		}
	}
	return nil
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

// mayCoverBelow reports whether a cgroup could be made below a path that is
// covered though the path itself is not: at one of the patterns' levels above a
// cgroup, or where units come and go.
func (c *cover) mayCoverBelow(p string) bool {
	if p == c.leaf || strings.HasPrefix(p, c.leaf+"/") {
		return false
	}
	unit := c.tree.Unit(p)
	if unit.Kind == cgroup.Service && matchAny(c.settings.ExceptUnits, unit.Name) {
		return false // with all that is below
	}
	if len(c.settings.Units) > 0 && c.holdsUnits(p) {
		return true
	}
	return slices.ContainsFunc(c.settings.Cgroups, func(pattern string) bool { return above(p, pattern) })
}

// holdsUnits reports whether units may be made below a path: a slice, a user's
// service manager, a configured unit root, and what is above them.
func (c *cover) holdsUnits(p string) bool {
	name := path.Base(p)
	if p == "/" || strings.HasSuffix(name, ".slice") || strings.HasPrefix(name, "user@") {
		return true
	}
	return slices.ContainsFunc(c.unitRoots, func(root string) bool { return p == root || strings.HasPrefix(root, p+"/") })
}

// above reports whether a pattern could match something below a path: its first
// parts match the path's, and there are more of them.
func above(p, pattern string) bool {
	if p == "/" {
		return true
	}
	parts, want := strings.Split(p, "/"), strings.Split(pattern, "/")
	if len(want) <= len(parts) {
		return false
	}
	for i, part := range parts {
		// A part that is malformed is a piece of a class with a slash in it: possible.
		if ok, err := path.Match(want[i], part); !ok && err == nil {
			return false
		}
	}
	return true
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
		covered := c.covers(p)
		table = append(table, capture.Cgroup{ID: id, Path: p, Covered: covered, Below: !covered && c.mayCoverBelow(p)})
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
