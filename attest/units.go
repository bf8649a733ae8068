package attest

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"ringfence.dev/attest/cgroup"
)

// unitDirs is where systemd looks for unit files, in order of precedence
// (systemd.unit(5), "System Unit Search Path", and the transient and generated
// ones). Both names of the distribution's directory are listed, because /lib
// was not always a link to /usr/lib.
var unitDirs = []string{
	"/etc/systemd/system.control",
	"/run/systemd/system.control",
	"/run/systemd/transient",
	"/run/systemd/generator.early",
	"/etc/systemd/system",
	"/etc/systemd/system.attached",
	"/run/systemd/system",
	"/run/systemd/system.attached",
	"/run/systemd/generator",
	"/usr/local/lib/systemd/system",
	"/usr/lib/systemd/system",
	"/lib/systemd/system",
	"/run/systemd/generator.late",
}

const (
	// seenLimit bounds the unit names that are remembered. A host has some
	// hundreds; once it is reached every executable counts as clashing.
	seenLimit = 65536
	// freshFor is how long an answer about unit files is good: a unit that is
	// installed now protects its name from then on.
	freshFor = time.Second
	// checksLimit bounds the remembered answers.
	checksLimit = 4096
)

// units knows which services exist on this host.
type units struct {
	dirs []string     // as unitDirs
	tree *cgroup.Tree // nil without cgroup v2

	// mu held means the maps are stable.
	mu     sync.Mutex
	seen   map[string]struct{} // names of services met in cgroup paths, at most seenLimit
	checks map[string]check    // at most checksLimit
}

type check struct {
	exists bool
	at     time.Time
}

func newUnits(dirs []string, tree *cgroup.Tree) *units {
	if dirs == nil {
		dirs = unitDirs
	}
	return &units{dirs: dirs, tree: tree, seen: make(map[string]struct{}), checks: make(map[string]check)}
}

// met remembers that a service ran here.
func (u *units) met(unit cgroup.Unit) {
	if unit.Kind != cgroup.Service {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.seen) < seenLimit {
		u.seen[unit.Name] = struct{}{}
	}
}

// exists reports whether NAME.service is, or has been, a unit of this host.
func (u *units) exists(name string) bool {
	unit, now := name+".service", time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, ok := u.seen[unit]; ok || len(u.seen) >= seenLimit {
		return true
	}
	if c, ok := u.checks[unit]; ok && now.Sub(c.at) < freshFor {
		return c.exists
	}
	if len(u.checks) >= checksLimit {
		clear(u.checks)
	}
	found := u.tree != nil && u.tree.HasUnit(unit) || len(u.files(unit)) > 0
	u.checks[unit] = check{exists: found, at: now}
	return found
}

// files returns the unit files of a service, most important first. An instance
// such as getty@tty1.service comes from its template getty@.service.
func (u *units) files(unit string) []string {
	names := []string{unit}
	if stem, _, ok := strings.Cut(unit, "@"); ok {
		names = append(names, stem+"@"+filepath.Ext(unit))
	}
	var found []string
	for _, name := range names {
		for _, dir := range u.dirs {
			p := filepath.Join(dir, name)
			if _, err := os.Lstat(p); err == nil {
				found = append(found, p)
			}
		}
	}
	return found
}

// fragments returns the path of the file that defines a service, under each
// name it has when /lib is a link to /usr/lib. None when a link decides (an
// alias, a masked or a linked unit), since only systemd knows what it made of it.
func (u *units) fragments(unit string) []string {
	files := u.files(unit)
	if len(files) == 0 {
		return nil
	}
	first, err := os.Lstat(files[0])
	if err != nil || !first.Mode().IsRegular() {
		return nil
	}
	out := files[:1]
	for _, p := range files[1:] {
		if fi, err := os.Lstat(p); err == nil && os.SameFile(first, fi) {
			out = append(out, p)
		}
	}
	return out
}
