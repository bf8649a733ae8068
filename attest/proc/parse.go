package proc

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"ringfence.dev/attest/workload"
)

// tick is one unit of the start time in stat: USER_HZ is 100 on every
// architecture that Go supports.
const tick = 10_000_000

// kernelThread is PF_KTHREAD, include/linux/sched.h.
const kernelThread = 0x00200000

// Stat is what we use of /proc/PID/stat, proc_pid_stat(5).
type Stat struct {
	workload.Process
	Comm   string // at most 15 bytes, chosen by the process
	State  byte   // 'R', 'S', 'Z' for a zombie, ...
	Parent uint32
	Kernel bool // a kernel thread
}

// parseStat reads the one line of stat. The second field may hold any byte,
// spaces and parentheses too, so the last ')' ends it: no later field has one.
func parseStat(text []byte) (Stat, error) {
	open, end := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
	if open < 1 || end < open {
		return Stat{}, errors.New("stat has no name field")
	}
	pid, err := strconv.ParseUint(strings.TrimSpace(string(text[:open])), 10, 32)
	if err != nil {
		return Stat{}, fmt.Errorf("stat: pid: %w", err)
	}
	fields := strings.Fields(string(text[end+1:])) // fields[0] is field 3, the state
	if len(fields) < 20 || len(fields[0]) != 1 {
		return Stat{}, fmt.Errorf("stat has %d fields after the name", len(fields))
	}
	parent, err1 := strconv.ParseUint(fields[1], 10, 32)
	flags, err2 := strconv.ParseUint(fields[6], 10, 64)
	start, err3 := strconv.ParseUint(fields[19], 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return Stat{}, fmt.Errorf("stat: %w", err)
	}
	if start > ^uint64(0)/tick {
		return Stat{}, errors.New("stat: start time out of range")
	}
	return Stat{
		Process: workload.Process{PID: uint32(pid), StartTime: start * tick},
		Comm:    string(text[open+1 : end]),
		State:   fields[0][0],
		Parent:  uint32(parent),
		Kernel:  flags&kernelThread != 0,
	}, nil
}

// Status is who a process runs as.
type Status struct {
	UID, EUID uint32 // real and effective
	GID, EGID uint32
	Groups    []uint32 // supplementary, in the kernel's order (ascending)
}

// parseStatus reads the Uid, Gid and Groups lines. Name comes before them and
// is the process's choice, but the kernel escapes newlines in it; still the
// first line is passed over and each of ours must occur exactly once.
func parseStatus(text []byte) (Status, error) {
	var st Status
	seen := 0
	_, rest, _ := bytes.Cut(text, []byte{'\n'})
	for line := range strings.Lines(string(rest)) {
		key, value, _ := strings.Cut(line, ":")
		bit := 0
		switch key {
		case "Uid":
			bit = 1
		case "Gid":
			bit = 2
		case "Groups":
			bit = 4
		default:
			continue
		}
		ids, err := numbers(value)
		if err != nil || seen&bit != 0 || bit != 4 && len(ids) != 4 {
			return Status{}, fmt.Errorf("status: malformed line %.80q", line)
		}
		seen |= bit
		switch bit {
		case 1:
			st.UID, st.EUID = ids[0], ids[1]
		case 2:
			st.GID, st.EGID = ids[0], ids[1]
		case 4:
			st.Groups = ids
		}
	}
	if seen != 7 {
		return Status{}, errors.New("status lacks its Uid, Gid or Groups line")
	}
	return st, nil
}

func numbers(text string) ([]uint32, error) {
	fields := strings.Fields(text)
	ids := make([]uint32, len(fields))
	for i, f := range fields {
		n, err := strconv.ParseUint(f, 10, 32)
		if err != nil {
			return nil, err
		}
		ids[i] = uint32(n)
	}
	return ids, nil
}

// Cgroups is a process's place in the hierarchies that tell services apart.
// An empty path means that the hierarchy is not there.
type Cgroups struct {
	V2      string // the unified hierarchy
	Systemd string // the v1 hierarchy called name=systemd
	// Removed means that the v2 cgroup was removed while the process lives on.
	Removed bool
}

// parseCgroups reads lines of the form hierarchy:controllers:path, cgroups(7).
// The kernel refuses newlines in cgroup names, so lines are lines; colons and
// the text " (deleted)" may be in a name.
func parseCgroups(text []byte) (Cgroups, error) {
	var cg Cgroups
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		parts := strings.SplitN(line, ":", 3)
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			return Cgroups{}, fmt.Errorf("cgroup: malformed line %.80q", line)
		}
		switch {
		case parts[0] == "0" && parts[1] == "" && cg.V2 == "":
			cg.V2 = parts[2]
			if base, ok := strings.CutSuffix(cg.V2, deletedSuffix); ok {
				cg.V2, cg.Removed = base, true
			}
		case parts[1] == "name=systemd" && cg.Systemd == "":
			cg.Systemd = parts[2]
		case parts[0] == "0" || parts[1] == "name=systemd":
			return Cgroups{}, errors.New("cgroup: a hierarchy is listed twice")
		}
	}
	return cg, nil
}
