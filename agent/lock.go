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

// instanceLock is held while an agent of an instance, or its cleaning up, runs.
type instanceLock struct{ file *os.File }

// Close ends the lock. The file stays.
func (l *instanceLock) Close() error { return l.file.Close() }

// remove takes the file away, with its directory if it was the last, and ends the lock.
func (l *instanceLock) remove() error {
	err := os.Remove(l.file.Name())
	_ = os.Remove(lockDir) // others may use it
	return errors.Join(err, l.file.Close())
}

// lockInstance makes sure that no other process works on the instance's state in
// the kernel. The lock ends with the process, however that ends.
func lockInstance(instance string) (*instanceLock, error) {
	path := filepath.Join(lockDir, "instance-"+instance+".lock")
	// A killed process holds its lock until the last of its threads has ended.
	for deadline := time.Now().Add(lockWait); ; {
		f, err := lockFile(path)
		switch {
		case err == nil:
			return &instanceLock{f}, nil
		case errors.Is(err, errReplaced):
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("lock instance %s: %w", instance, err)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("%w (%q): stop it first, or give this one another name with the key instance", errRunning, instance)
		default:
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// errReplaced reports a lock on a file that was removed between opening and locking it.
var errReplaced = errors.New("the lock file was removed meanwhile")

// lockFile opens and locks the file at path. Without the look whether it is
// still the file at path, two processes could each hold "the" lock.
func lockFile(path string) (*os.File, error) {
	if err := os.MkdirAll(lockDir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errReplaced // with its directory
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	var held, there unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &held)
	if err == nil && unix.Lstat(path, &there) == nil && there.Ino == held.Ino && there.Dev == held.Dev {
		return f, nil
	}
	f.Close()
	if err != nil {
		return nil, err
	}
	return nil, errReplaced
}
