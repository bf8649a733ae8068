package proc

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/workload"
	"ringfence.dev/test/nettest"
)

// TestRecycledPID gives a dead process's number to a new one, in a pid
// namespace where the next number can be chosen (ns_last_pid, CRIU's way), and
// looks through a handle and an image of the first.
func TestRecycledPID(t *testing.T) {
	nettest.RequireRoot(t)
	cmd := exec.Command("/proc/self/exe", "inside-pid-namespace")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// tryRecycle runs as process 1 of the namespace.
func tryRecycle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	fs := New("")
	first, err := cat()
	if err != nil {
		return err
	}
	pid := uint32(first.Process.Pid)
	h, err := fs.Open(pid)
	if err != nil {
		return err
	}
	defer h.Close()
	img, err := fs.ReadHandle(h)
	if err != nil {
		return err
	}
	stop(first)
	second, err := respawn(fs, img)
	if err != nil {
		return err
	}
	defer stop(second)
	if _, err := fs.ReadHandle(h); !errors.Is(err, workload.ErrGone) {
		return fmt.Errorf("handle of the first process reads the second: %v", err)
	}
	if err := h.Unchanged(&img); !errors.Is(err, workload.ErrGone) {
		return fmt.Errorf("image of the first process passes for unchanged: %v", err)
	}
	h2, err := fs.Open(pid)
	if err != nil {
		return err
	}
	defer h2.Close()
	if err := h2.Unchanged(&img); !errors.Is(err, workload.ErrGone) {
		return fmt.Errorf("the second process passes for the first: %v", err)
	}
	return nil
}

// respawn starts processes until one has the old one's number and a later start
// time. Threads of our own runtime may take the number first, hence the loop.
func respawn(fs *FS, old Image) (*exec.Cmd, error) {
	for range 200 {
		last := strconv.FormatUint(uint64(old.PID)-1, 10)
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(last), 0); err != nil {
			return nil, err
		}
		cmd, err := cat()
		if err != nil {
			return nil, err
		}
		img, err := fs.Read(uint32(cmd.Process.Pid))
		if err == nil && img.PID == old.PID && img.StartTime != old.StartTime {
			return cmd, nil
		}
		stop(cmd)
	}
	return nil, errors.New("the pid could not be had again in 200 attempts")
}

func cat() (*exec.Cmd, error) {
	cmd := exec.Command("/bin/cat")
	if _, err := cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return cmd, cmd.Start()
}

func stop(cmd *exec.Cmd) {
	cmd.Process.Kill()
	cmd.Wait()
}
