package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process names a process that may be another program's child: a pid alone
// could have been given to somebody else since.
type process struct {
	PID   int
	Start uint64 // clock ticks since boot, as in /proc/PID/stat
}

// errGone reports that a process has ended, or that its pid is another's now.
var errGone = errors.New("process is gone")

// inspect reads a live process's identity. A zombie counts as gone.
func inspect(pid int) (process, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return process{}, errGone
	}
	// The name in parentheses may itself hold spaces and parentheses.
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return process{}, errGone
	}
	fields := strings.Fields(string(stat[end+1:]))
	const state, start = 0, 19 // fields 3 and 22 of proc(5)
	if len(fields) <= start || fields[state] == "Z" || fields[state] == "X" {
		return process{}, errGone
	}
	ticks, err := strconv.ParseUint(fields[start], 10, 64)
	if err != nil {
		return process{}, fmt.Errorf("process %d: start time: %w", pid, err)
	}
	return process{PID: pid, Start: ticks}, nil
}

// readPIDFile reads a process from a pid file. It returns errGone when there is none.
func readPIDFile(path string) (process, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return process{}, errGone
	}
	if err != nil {
		return process{}, err
	}
	var p process
	if _, err := fmt.Sscan(string(data), &p.PID, &p.Start); err != nil || p.PID <= 1 {
		return process{}, fmt.Errorf("pid file %s is malformed", path)
	}
	return p, nil
}

func (p process) writePIDFile(path string) error {
	return writeFile(path, fmt.Appendf(nil, "%d %d\n", p.PID, p.Start))
}

// open returns a pidfd of exactly this process, or errGone.
func (p process) open() (int, error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, errGone
	}
	if err != nil {
		return -1, fmt.Errorf("pidfd of %d: %w", p.PID, err)
	}
	// Compared after opening: from here on the descriptor cannot come to mean another process.
	if now, err := inspect(p.PID); err != nil || now != p {
		unix.Close(fd)
		return -1, errGone
	}
	return fd, nil
}

func (p process) alive() bool {
	fd, err := p.open()
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}

// stop asks the process to end, and ends it when grace has passed or ctx is over.
func (p process) stop(ctx context.Context, grace time.Duration) error {
	fd, err := p.open()
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := sendSignal(fd, unix.SIGTERM); err != nil {
		return err
	}
	// A stopped process acts on SIGTERM only after it has been continued.
	_ = sendSignal(fd, unix.SIGCONT)
	if ended(ctx, fd, grace) {
		return nil
	}
	if err := sendSignal(fd, unix.SIGKILL); err != nil {
		return err
	}
	if !ended(context.WithoutCancel(ctx), fd, 5*time.Second) {
		return fmt.Errorf("process %d does not end even when killed", p.PID)
	}
	return nil
}

func sendSignal(fd int, sig unix.Signal) error {
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %s: %w", unix.SignalName(sig), err)
	}
	return nil
}

// ended waits until the process behind a pidfd has ended, at most for limit.
func ended(ctx context.Context, fd int, limit time.Duration) bool {
	deadline := time.Now().Add(limit)
	for {
		// In slices, because poll does not see ctx.
		left := min(50*time.Millisecond, time.Until(deadline))
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, max(0, int(left.Milliseconds())))
		if n == 1 {
			return true
		}
		if (err != nil && !errors.Is(err, unix.EINTR)) || ctx.Err() != nil || !time.Now().Before(deadline) {
			return false
		}
	}
}
