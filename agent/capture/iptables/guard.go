package iptables

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// GuardLimit is how long the agent may be silent before the guard takes it
	// for dead. A killed agent is noticed at once, because its end of the connection
	// closes; the limit is for one that is stopped or hangs.
	GuardLimit = 3 * time.Second
	// beatEvery leaves room for five lost beats on a machine that is busy.
	beatEvery = GuardLimit / 6
	// answerLimit bounds the wait for the guard, which answers at once unless the
	// machine is.
	answerLimit = 5 * time.Second
	// restartPause keeps a guard that cannot live from being started over and over.
	restartPause = 10 * time.Second
)

// Guard is the agent's side of the guard process. It is safe for concurrent use.
type Guard struct {
	start func() (net.Conn, func(), error)

	// mu held means that no other question is under way.
	mu    sync.Mutex
	conn  net.Conn // nil when the process is gone
	lines *lines
	stop  func() // ends the process and waits
	fired bool   // the guard said so, and nobody has acted on it yet
	done  bool
}

// StartGuard starts program as guard. It has to call [RunGuard] with its
// descriptor [GuardFD], and outlives the agent by as long as writing rules takes. It
// leads a session of its own, so a terminal's signals do not reach it. A service
// manager that ends the agent's whole cgroup sends it SIGTERM as soon as the agent
// dies, which it should therefore ignore: it ends by itself.
func StartGuard(program string, args ...string) (*Guard, error) {
	g := &Guard{start: func() (net.Conn, func(), error) { return spawn(program, args) }}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g, g.connectLocked()
}

func spawn(program string, args []string) (net.Conn, func(), error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	cmd := exec.Command(program, args...)
	cmd.ExtraFiles = []*os.File{theirs} // becomes GuardFD
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		ours.Close()
		return nil, nil, fmt.Errorf("start the guard: %w", err)
	}
	stop := func() {
		ours.Close()
		end := time.AfterFunc(answerLimit, func() { _ = cmd.Process.Kill() })
		defer end.Stop()
		_ = cmd.Wait() // how it ended matters to nobody
	}
	return ours, stop, nil
}

func socketpair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	file := os.NewFile(uintptr(fds[0]), "guard")
	defer file.Close() // FileConn duplicates it
	theirs = os.NewFile(uintptr(fds[1]), "guard")
	if ours, err = net.FileConn(file); err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

func (g *Guard) connectLocked() error {
	if g.done {
		return net.ErrClosed
	}
	conn, stop, err := g.start()
	if err != nil {
		return err
	}
	g.conn, g.stop, g.lines = conn, stop, &lines{conn: conn}
	return nil
}

// Close ends the guard without letting it act. It may be called twice.
func (g *Guard) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.done = true
	g.dropLocked()
	return nil
}

func (g *Guard) dropLocked() {
	if g.conn != nil {
		g.stop()
		g.conn = nil
	}
}

func (g *Guard) arm(w will) error { return g.ask(request{Op: "arm", Will: &w}) }

func (g *Guard) forget(scope string) error {
	return g.ask(request{Op: "forget", Will: &will{Scope: scope}})
}

// ask puts one question. A guard that does not answer is dropped: run starts
// another one, and arms it.
func (g *Guard) ask(r request) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn == nil {
		if r.Op == "beat" {
			return net.ErrClosed
		}
		return nil // whoever starts the next one arms it with all scopes
	}
	answer, err := g.exchangeLocked(r)
	if err != nil {
		g.dropLocked()
		if r.Op != "beat" {
			return nil
		}
		return err
	}
	g.fired = g.fired || answer.Fired
	if answer.Error != "" {
		return fmt.Errorf("guard: %s", answer.Error)
	}
	return nil
}

func (g *Guard) exchangeLocked(r request) (answer reply, err error) {
	if err := g.conn.SetDeadline(time.Now().Add(answerLimit)); err != nil {
		return answer, err
	}
	if err := send(g.conn, r); err != nil {
		return answer, err
	}
	line, err := g.lines.next()
	if err != nil {
		return answer, err
	}
	return answer, json.Unmarshal(line, &answer)
}

// run beats until ctx ends. A guard that is gone is replaced, but not more often
// than every restartPause. rearm is called after the guard has acted, and after a
// new one was started; it arms every scope. lost is told why a guard was lost or
// could not be started.
func (g *Guard) run(ctx context.Context, rearm func(), lost func(error)) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	var started time.Time
	for {
		err := g.ask(request{Op: "beat"})
		restarted := false
		if err != nil && ctx.Err() == nil && time.Since(started) > restartPause {
			lost(err)
			started = time.Now()
			if err = g.restart(); errors.Is(err, net.ErrClosed) {
				return // Close was called
			}
			if restarted = err == nil; !restarted {
				lost(err)
			}
		}
		if g.takeFired() || restarted {
			rearm()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (g *Guard) restart() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.connectLocked()
}

func (g *Guard) takeFired() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	fired := g.fired
	g.fired = false
	return fired
}

// nsPath names a descriptor of this process for another one.
func nsPath(fd int) string {
	return "/proc/" + strconv.Itoa(os.Getpid()) + "/fd/" + strconv.Itoa(fd)
}
