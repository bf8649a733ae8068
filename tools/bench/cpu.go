package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tree lists processes with all their descendants.
func tree(roots []int) ([]int, error) {
	children, err := childrenOfAll()
	if err != nil {
		return nil, err
	}
	all := append([]int(nil), roots...)
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all, nil
}

// childrenOfAll maps each process to its children.
func childrenOfAll() (map[int][]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, path := range stats {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended since
		}
		_, after, _ := strings.Cut(string(data), ") ")
		fields := strings.Fields(after)
		pid, err1 := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if len(fields) < 2 || err1 != nil {
			continue
		}
		if parent, err := strconv.Atoi(fields[1]); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	return children, nil
}

// cpuTime is the user and system time of a process so far: all its threads,
// those that have ended included, to the nanosecond. The process's CPU-time
// clock tells it; the figures in /proc/PID/stat are rounded to 10 ms.
func cpuTime(pid int) (time.Duration, error) {
	// The kernel's encoding of a process's clock: the inverted pid, and
	// CPUCLOCK_SCHED in the low bits (include/linux/posix-timers.h).
	clock := int32(^pid<<3 | 2)
	var ts unix.Timespec
	if err := unix.ClockGettime(clock, &ts); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// usage is the CPU time of the proxies and of the whole machine at one moment.
type usage struct {
	processes map[int]time.Duration
	busy      time.Duration // all but idle, of all processors, at 10 ms granularity
}

// look reads the usage of the proxies and all their descendants.
func look(proxies []int) (usage, error) {
	u := usage{processes: map[int]time.Duration{}}
	pids, err := tree(proxies)
	if err != nil {
		return u, err
	}
	for _, pid := range pids {
		if u.processes[pid], err = cpuTime(pid); err != nil {
			return u, err
		}
	}
	u.busy, err = machineBusy()
	return u, err
}

// since returns what was used between two looks. A process that ended in
// between took its figure with it, so that is an error.
func (u usage) since(before usage) (proxies, machine time.Duration, err error) {
	for pid := range before.processes {
		if _, ok := u.processes[pid]; !ok {
			return 0, 0, fmt.Errorf("process %d of the pair ended while it was measured", pid)
		}
	}
	for pid, t := range u.processes {
		proxies += t - before.processes[pid]
	}
	return proxies, u.busy - before.busy, nil
}

// machineBusy reads the time that processors were not idle, from /proc/stat.
// It holds what no process is charged with: interrupts and softirqs.
func machineBusy() (time.Duration, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return parseBusy(line)
}

func parseBusy(line string) (time.Duration, error) {
	f := strings.Fields(line)
	if len(f) < 8 || f[0] != "cpu" {
		return 0, errors.New("/proc/stat does not begin with the sum of all processors")
	}
	var ticks uint64
	for _, i := range []int{1, 2, 3, 6, 7} { // user, nice, system, irq, softirq; not idle, iowait, steal
		v, err := strconv.ParseUint(f[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks += v
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture that Go supports
	return time.Duration(ticks) * tick, nil
}

// residentSet is the memory of the proxies and their descendants, in bytes.
func residentSet(proxies []int) (sum int64, err error) {
	pids, err := tree(proxies)
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, err
		}
		for s := bufio.NewScanner(f); s.Scan(); {
			var kb int64
			if n, _ := fmt.Sscanf(s.Text(), "VmRSS: %d kB", &kb); n == 1 {
				sum += kb << 10
			}
		}
		f.Close()
	}
	return sum, nil
}
