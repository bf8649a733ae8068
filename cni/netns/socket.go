package netns

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Socket opens a socket in the namespace: close-on-exec, and non-blocking when
// typ carries SOCK_NONBLOCK. A socket belongs to its namespace for life, so it
// may be connected, bound and used from any thread afterwards.
//
// It is on the path of every dial. The calling thread itself goes there and
// back, in two system calls; handing the work to another thread costs two
// context switches instead, measured at six times as much.
func (h *Handle) Socket(domain, typ, proto int) (fd int, err error) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.file == nil {
		return -1, ErrClosed
	}
	if h.own {
		fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, proto)
		return fd, os.NewSyscallError("socket", err)
	}
	home, err := homeNamespace()
	if err != nil {
		return -1, err
	}
	runtime.LockOSThread()
	if err := unix.Setns(h.fd, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return -1, fmt.Errorf("enter network namespace %s: %w", h.path, err)
	}
	fd, err = unix.Socket(domain, typ|unix.SOCK_CLOEXEC, proto)
	if unix.Setns(home, unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	// Otherwise the goroutine stays wedded to the thread, and the runtime ends the
	// thread with it: nothing else can come to run in the wrong namespace.
	if err != nil {
		return -1, fmt.Errorf("socket in network namespace %s: %w", h.path, err)
	}
	return fd, nil
}

// homeNamespace is an open descriptor of the namespace that the process was
// started in, kept for its life. The first call comes before any thread moves.
var homeNamespace = sync.OnceValues(func() (int, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", os.Getpid()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open own network namespace: %w", err)
	}
	return fd, nil
})
