package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Listen opens the admin socket at path with mode 0600, its directory with 0700
// if it has to be made. A socket that a dead agent left is replaced; one that
// answers is an error, and so is anything else of that name.
func Listen(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the admin socket's directory: %w", err)
	}
	// Of two agents that find the same stale socket, the second would remove the
	// first one's new socket.
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, fmt.Errorf("admin socket %s: %w", path, err)
	}
	defer unlock()
	if err := makeRoom(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: private}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("open the admin socket: %w", err)
	}
	return ln, nil
}

// private gives the socket mode 0600 before it has a name: bind(2) makes the file
// with the mode of the socket's own inode (unix_bind_bsd in net/unix/af_unix.c).
// A chmod afterwards would leave a gap, and the process's umask is everybody's.
func private(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) }), err)
}

// lockDir holds a directory against others that look for stale sockets in it.
func lockDir(dir string) (unlock func() error, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another program holds the lock of %s (is an agent just starting?): %w", dir, err)
	}
	return f.Close, nil
}

// makeRoom makes room at path.
func makeRoom(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("admin socket: %w", err)
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("admin socket %s: something else is there and is left alone: remove it, or set another admin.socket", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("another agent answers on %s: stop it first, or set another instance and admin.socket", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("admin socket %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the stale admin socket: %w", err)
	}
	return nil
}
