package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// lock lets one command at a time change a lab. A second one is refused rather
// than made to wait, since what it was asked may no longer make sense.
func lock(name string) (unlock func(), err error) {
	for {
		f, err := tryLock(filepath.Join(runDir, name+".lock"))
		if err != nil {
			return nil, err
		}
		if f == nil {
			continue // somebody unlocked, and removed the file, between our open and our lock
		}
		return func() {
			os.Remove(f.Name()) // while it is locked: nobody else can have locked this file
			f.Close()
			_ = os.Remove(runDir) // the last lab's last command; not empty otherwise
		}, nil
	}
}

// tryLock returns nil without an error when the file it locked is no longer the one at path.
func tryLock(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.New("another command is changing this lab: try again when it is done")
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	mine, err1 := f.Stat()
	named, err2 := os.Stat(path)
	if err1 != nil || err2 != nil || !os.SameFile(mine, named) {
		f.Close()
		return nil, nil
	}
	return f, nil
}
