package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupRoot finds where cgroup v2 is mounted: /sys/fs/cgroup on a unified
// system, /sys/fs/cgroup/unified beside the v1 controllers on a hybrid one.
func cgroupRoot() (string, error) {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("cgroup v2 is mounted neither at /sys/fs/cgroup nor at /sys/fs/cgroup/unified")
}

// unitPattern is what systemd allows in a service's name, without the escapes
// that a path component cannot hold.
var unitPattern = regexp.MustCompile(`^[a-zA-Z0-9:_.@-]{1,200}$`)

// unitName makes NAME or NAME.service the name of a unit.
func unitName(name string) (string, error) {
	name = strings.TrimSuffix(name, ".service")
	if !unitPattern.MatchString(name) || name == "." || name == ".." {
		return "", fmt.Errorf("%q is no name of a unit: letters, digits and : _ . @ - only", name)
	}
	return name + ".service", nil
}

// unitDir makes the cgroup of a unit, if need be, and returns its directory.
func (l *Lab) unitDir(host, unit string) (string, error) {
	unit, err := unitName(unit)
	if err != nil {
		return "", err
	}
	root, err := cgroupRoot()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, l.UnitRoot(host), unit)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("cgroup of unit %s: %w", unit, err)
	}
	return dir, nil
}

// units lists the units of a host, with the pids in each.
func (l *Lab) units(host string) map[string][]int {
	root, err := cgroupRoot()
	if err != nil {
		return nil
	}
	found := map[string][]int{}
	dirs, _ := filepath.Glob(filepath.Join(root, l.UnitRoot(host), "*.service"))
	for _, dir := range dirs {
		found[strings.TrimSuffix(filepath.Base(dir), ".service")] = members(dir)
	}
	return found
}

// members reads the pids of one cgroup.
func members(dir string) (pids []int) {
	f, err := os.Open(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if pid, err := strconv.Atoi(s.Text()); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// removeTree removes a cgroup and all below it, deepest first. A process that is
// still in it is killed.
func removeTree(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := removeOne(dirs[i]); err != nil {
			return err
		}
	}
	return nil
}

// removeOne removes one empty cgroup. A process that has just ended may still
// be counted for some milliseconds.
func removeOne(dir string) error {
	for deadline := time.Now().Add(2 * time.Second); ; {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		for _, pid := range members(dir) {
			if p, err := inspect(pid); err == nil {
				kill(p)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func kill(p process) {
	if fd, err := p.open(); err == nil {
		_ = sendSignal(fd, unix.SIGKILL)
		unix.Close(fd)
	}
}
