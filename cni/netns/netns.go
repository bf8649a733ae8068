// Package netns opens network namespaces and does single things inside them:
// run a function, open a socket. A goroutine never stays in a foreign
// namespace: work is done on an operating system thread of its own, which dies
// when it cannot return home.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrClosed reports use of a Handle after Close.
var ErrClosed = errors.New("netns: handle is closed")

// Handle is an open network namespace. It keeps the namespace alive, whether
// or not a process or a mount does. It is safe for concurrent use.
type Handle struct {
	path string
	// Set at opening, then read-only.
	cookie   uint64
	dev, ino uint64
	own      bool // the namespace this process was started in: no thread needs to move

	// mu held for reading means file is open.
	mu   sync.RWMutex
	file *os.File // nil once closed
	fd   int      // file's descriptor
}

// Open opens the network namespace at path, such as /run/netns/web or
// /proc/1234/ns/net. A path that is no network namespace is an error.
func Open(path string) (*Handle, error) {
	// Before any thread of ours can be in another one.
	if _, err := homeNamespace(); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	h := &Handle{path: path, file: f, fd: int(f.Fd())}
	if err := h.inspect(); err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return h, nil
}

// OfPID opens the network namespace of a running process.
func OfPID(pid int) (*Handle, error) {
	return Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
}

// Self opens the namespace this process was started in.
func Self() (*Handle, error) {
	home, err := homeNamespace()
	if err != nil {
		return nil, err
	}
	// Not /proc/self/ns/net: that is where the main thread is, which Do may have sent away.
	h, err := Open("/proc/self/fd/" + strconv.Itoa(home))
	if err == nil {
		h.path = "/proc/self/ns/net"
	}
	return h, err
}

func (h *Handle) inspect() error {
	// NS_GET_NSTYPE tells a namespace from any other file, and its kind.
	kind, err := unix.IoctlRetInt(h.fd, unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return errors.New("not a network namespace (nothing mounted there, or another kind)")
	}
	home, err := homeNamespace()
	if err != nil {
		return err
	}
	var st, own unix.Stat_t
	if err := errors.Join(unix.Fstat(h.fd, &st), unix.Fstat(home, &own)); err != nil {
		return err
	}
	h.dev, h.ino = st.Dev, st.Ino
	h.own = own.Dev == st.Dev && own.Ino == st.Ino
	fd, err := h.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// SO_NETNS_COOKIE is Linux 5.14; before, capture by cookie is not available and zero says so.
	h.cookie, _ = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return nil
}

// Cookie is the kernel's number of the namespace, unique per boot and never
// reused. Zero means the kernel does not tell (before Linux 5.14).
func (h *Handle) Cookie() uint64 { return h.cookie }

// Path is the path it was opened by.
func (h *Handle) Path() string { return h.path }

// Inode is the namespace's inode number on nsfs.
func (h *Handle) Inode() uint64 { return h.ino }

// Own reports whether this is the namespace the process was started in.
func (h *Handle) Own() bool { return h.own }

// Same reports whether both handles are the same namespace.
func (h *Handle) Same(o *Handle) bool { return h.dev == o.dev && h.ino == o.ino }

// FD is the descriptor of the namespace file, valid until Close. It is -1 after.
func (h *Handle) FD() int {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.file == nil {
		return -1
	}
	return h.fd
}

// Close lets go of the namespace. It may be called twice.
func (h *Handle) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file == nil {
		return nil
	}
	err := h.file.Close()
	h.file = nil
	return err
}

// Do runs fn on a thread that has entered the namespace. fn must not start
// goroutines that count on the namespace, and everything it opens there (a
// socket, a child process) stays in it. The thread returns home afterwards, or
// ends if it cannot.
func (h *Handle) Do(fn func() error) error {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.file == nil {
		return ErrClosed
	}
	if h.own {
		return fn()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := homeNamespace()
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		if err := unix.Setns(h.fd, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace %s: %w", h.path, err)
			return
		}
		err = guarded(fn)
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		// Otherwise the goroutine ends while still locked, and the runtime ends the thread with it.
		done <- err
	}()
	return <-done
}

// guarded turns a Goexit or panic of fn (a test's FailNow, say) into an error,
// so that the caller of Do is not left waiting.
func guarded(fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic inside network namespace: %v", r)
		}
	}()
	return fn()
}
