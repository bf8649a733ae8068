package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"ringfence.dev/cni/netns"
)

// Exec turns this process into argv running on a host: in its network
// namespace and, with a unit, in that unit's cgroup, so that it has the
// identity of that name. It only returns to report an error; a program that
// cannot be found matches [exec.ErrNotFound].
func (l *Lab) Exec(host, unit string, argv []string) error {
	if err := isHost(host); err != nil {
		return err
	}
	if len(argv) == 0 {
		return errors.New("no command given")
	}
	env := l.Env(host, os.Environ())
	path, err := lookPath(argv[0], env)
	if err != nil {
		return err
	}
	if unit != "" {
		if err := l.join(host, unit); err != nil {
			return err
		}
	}
	// The thread that calls execve becomes the program, so the namespace must be this thread's.
	runtime.LockOSThread()
	ns, err := os.Open(l.NetNS(host))
	if err != nil {
		return fmt.Errorf("host %s: %w", host, err)
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter host %s: %w", host, err)
	}
	return &os.PathError{Op: "run", Path: path, Err: syscall.Exec(path, argv, env)}
}

// join moves this whole process into a unit's cgroup.
func (l *Lab) join(host, unit string) error {
	dir, err := l.unitDir(host, unit)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, "cgroup.procs"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString("0"); err != nil {
		return fmt.Errorf("join unit %s: %w", unit, err)
	}
	return nil
}

// Start starts cmd on a host: in its network namespace and, with a unit, in
// that unit's cgroup from its first instruction on. The caller waits for it.
func (l *Lab) Start(host, unit string, cmd *exec.Cmd) error {
	if err := isHost(host); err != nil {
		return err
	}
	if cmd.Env == nil {
		cmd.Env = l.Env(host, os.Environ())
	}
	ns, err := netns.Open(l.NetNS(host))
	if err != nil {
		return fmt.Errorf("host %s: %w", host, err)
	}
	defer ns.Close()
	if unit == "" {
		return ns.Do(cmd.Start)
	}
	return l.startInUnit(host, unit, cmd, ns.Do)
}

// Here is the name below which units of the machine itself live, see StartHere.
const Here = "here"

// StartHere starts cmd in a unit on this machine itself, with its own network.
// The unit is the lab's, below UnitRoot([Here]), and ends with it.
func (l *Lab) StartHere(unit string, cmd *exec.Cmd) error {
	return l.startInUnit(Here, unit, cmd, func(start func() error) error { return start() })
}

func (l *Lab) startInUnit(host, unit string, cmd *exec.Cmd, inside func(func() error) error) error {
	dir, err := l.unitDir(host, unit)
	if err != nil {
		return err
	}
	cgroup, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer cgroup.Close()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(cgroup.Fd())
	return inside(cmd.Start)
}

// Env is the environment of a program on a host: status commands reach that
// host's agent, and the ringfence command is found.
func (l *Lab) Env(host string, base []string) []string {
	path := filepath.Dir(l.opts.Binary)
	env := []string{"RINGFENCE_SOCKET=" + l.Socket(host)}
	for _, e := range base {
		name, value, _ := strings.Cut(e, "=")
		switch name {
		case "RINGFENCE_SOCKET":
		case "PATH":
			path += ":" + value
		default:
			env = append(env, e)
		}
	}
	return append(env, "PATH="+path)
}

// lookPath finds a program by the PATH of env rather than by our own.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, executable(name)
	}
	for _, e := range env {
		list, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(list) {
			if path := filepath.Join(dir, name); filepath.IsAbs(dir) && executable(path) == nil {
				return path, nil
			}
		}
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}

func executable(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return &exec.Error{Name: path, Err: exec.ErrNotFound}
	}
	if st.IsDir() || st.Mode()&0o111 == 0 {
		return &exec.Error{Name: path, Err: os.ErrPermission}
	}
	return nil
}
