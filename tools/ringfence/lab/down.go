package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// programGrace is how long programs on a host may take to end when the lab goes.
const programGrace = 2 * time.Second

// Down removes a lab, whatever of it there is: agents and what they installed,
// programs still running on its hosts, namespaces, cgroups, state. It finds
// them by name, so it works after a crash of anything, and twice. binary is
// used where the lab's own state is lost; empty means this very program.
func Down(ctx context.Context, name, binary string) error {
	if os.Geteuid() != 0 {
		return errors.New("the lab needs root")
	}
	l, err := Open(name)
	if err != nil {
		// No state, or unreadable: what is named after the lab is its remains.
		o, err := Options{Name: name, Capture: "off", Binary: binary}.checked()
		if err != nil {
			return err
		}
		l = &Lab{opts: o, agents: map[string]*Agent{}}
	}
	return l.Down(ctx)
}

// Down removes the lab and leaves nothing.
func (l *Lab) Down(ctx context.Context) error {
	unlock, err := lock(l.opts.Name)
	if err != nil {
		return err
	}
	defer unlock()
	return l.down(ctx)
}

func (l *Lab) down(ctx context.Context) error {
	var errs []error
	for _, h := range []string{"a", "b", Here} {
		errs = append(errs, l.endPrograms(ctx, h), l.removeAgent(ctx, h))
	}
	errs = append(errs, l.removeNetwork(), l.removeCgroups())
	if err := errors.Join(errs...); err != nil {
		return err // the state stays, for another try
	}
	if err := os.RemoveAll(l.path()); err != nil {
		return err
	}
	return nil
}

// removeAgent removes the agent of a host, should there be one.
func (l *Lab) removeAgent(ctx context.Context, host string) error {
	a, ok := l.agents[host]
	if !ok {
		a = &Agent{Binary: l.opts.Binary, Dir: l.path(host)}
	}
	if err := a.Remove(ctx); err != nil {
		return fmt.Errorf("host %s: %w", host, err)
	}
	return nil
}

// endPrograms ends every process on a host: in its namespace, or in one of its units.
func (l *Lab) endPrograms(ctx context.Context, host string) error {
	programs := l.programs(host)
	for _, p := range programs {
		if p.PID == os.Getpid() {
			return fmt.Errorf("this command runs on host %s of the lab itself: leave it first", host)
		}
	}
	for _, p := range programs {
		if fd, err := p.open(); err == nil {
			_ = sendSignal(fd, unix.SIGTERM)
			_ = sendSignal(fd, unix.SIGCONT)
			unix.Close(fd)
		}
	}
	deadline := time.Now().Add(programGrace)
	var errs []error
	for _, p := range programs {
		errs = append(errs, p.stop(ctx, time.Until(deadline)))
	}
	return errors.Join(errs...)
}

// programs lists the processes on a host.
func (l *Lab) programs(host string) (found []process) {
	seen := map[int]bool{}
	add := func(pid int) {
		if p, err := inspect(pid); err == nil && !seen[pid] {
			seen[pid] = true
			found = append(found, p)
		}
	}
	var ns unix.Stat_t
	if unix.Stat(l.NetNS(host), &ns) == nil {
		for _, pid := range allPIDs() {
			var st unix.Stat_t
			if unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &st) == nil && st.Dev == ns.Dev && st.Ino == ns.Ino {
				add(pid)
			}
		}
	}
	for _, pids := range l.units(host) {
		for _, pid := range pids {
			add(pid)
		}
	}
	return found
}

func allPIDs() (pids []int) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (l *Lab) removeCgroups() error {
	root, err := cgroupRoot()
	if err != nil {
		return nil // then there cannot be any
	}
	return removeTree(filepath.Join(root, "rf-"+l.opts.Name))
}
