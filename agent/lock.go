package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lockDir holds the locks of running agents. It is a fixed place because what
// it guards, pins and cgroups, is the kernel's and known by the instance's name
// alone. It is emptied by a reboot, as the kernel is.
const lockDir = "/run/ringfence"

// lockWait is how long a process that was killed may take to be gone.
const lockWait = time.Second

// errRunning reports that an agent of the instance lives.
var errRunning = errors.New("an agent of this instance is running")

// lockInstance makes sure that no other process works on the instance's state in
// the kernel. The lock ends with the process, however that ends; the file
// stays, because removing a locked file lets two processes hold "the" lock.
func lockInstance(instance string) (*os.File, error) {
	if err := os.MkdirAll(lockDir, 0o700); err != nil {
		return nil, fmt.Errorf("lock instance %s: %w", instance, err)
	}
	path := filepath.Join(lockDir, "instance-"+instance+".lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock instance %s: %w", instance, err)
	}
	// A killed process holds its lock until the last of its threads has ended.
	for deadline := time.Now().Add(lockWait); ; {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w (%q): stop it first, or give this one another name with the key instance", errRunning, instance)
	}
	return nil, fmt.Errorf("lock instance %s: %w", instance, err)
}
