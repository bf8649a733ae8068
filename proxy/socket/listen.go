package socket

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Accepted is one accepted connection. FD is non-blocking, close-on-exec and
// owned by whoever received it.
type Accepted struct {
	FD     int
	Remote netip.AddrPort
}

// Listener accepts from a listening socket that somebody else opened, usually
// in another network namespace. One goroutine accepts at a time.
type Listener struct {
	file  *os.File
	raw   syscall.RawConn
	local netip.AddrPort

	// Owned by the accepting goroutine.
	acceptFn func(fd uintptr) bool
	got      Accepted
	err      error
	addr     unix.RawSockaddrAny
	addrLen  uint32
}

// Listen makes a Listener of fd, which stays the caller's: it is duplicated, so
// the kernel goes on queueing connections until the caller closes its own.
// TCP fast open is switched off: data in a SYN would arrive before its origin is known.
func Listen(fd int, t Timeouts) (*Listener, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", os.NewSyscallError("fcntl", err))
	}
	l, err := listen(dup, t)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

func listen(fd int, t Timeouts) (*Listener, error) {
	if err := prepare(fd, t); err != nil {
		unix.Close(fd)
		return nil, err
	}
	local, err := LocalAddr(fd)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "listener")
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	l := &Listener{file: f, raw: raw, local: local}
	l.acceptFn = l.acceptReady
	return l, nil
}

func prepare(fd int, t Timeouts) error {
	if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on == 0 {
		return fmt.Errorf("descriptor %d is no listening socket", fd)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	// Not every kernel lets it be set; off is the default, so that is no failure.
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 0)
	return Tune(fd, t)
}

// Addr is the address that the listener is bound to, never v4-mapped.
func (l *Listener) Addr() netip.AddrPort { return l.local }

// Close stops accepting; a waiting Accept returns ErrClosed. It may be called twice.
func (l *Listener) Close() error {
	if err := l.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Accept waits for the next connection. A connection that was aborted while it
// was queued is passed over. See [Exhausted] for errors that go away by waiting.
func (l *Listener) Accept() (Accepted, error) {
	l.err = nil
	if err := l.raw.Read(l.acceptFn); err != nil {
		return Accepted{}, pollError(err)
	}
	return l.got, l.err
}

func (l *Listener) acceptReady(fd uintptr) bool {
	for {
		l.addrLen = unix.SizeofSockaddrAny
		n, _, errno := syscall.RawSyscall6(unix.SYS_ACCEPT4, fd, uintptr(unsafe.Pointer(&l.addr)),
			uintptr(unsafe.Pointer(&l.addrLen)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		switch errno {
		case 0:
			l.got = Accepted{FD: int(n), Remote: rawAddr(&l.addr)}
			return true
		case unix.EAGAIN:
			return false
		case unix.EINTR, unix.ECONNABORTED, unix.EPROTO:
			// accept(2): such errors belong to the new connection, not to the listener.
			continue
		default:
			l.err = os.NewSyscallError("accept4", errno)
			return true
		}
	}
}

// Exhausted reports whether err says that descriptors or memory are used up:
// accepting again at once would only spin.
func Exhausted(err error) bool {
	for _, errno := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// ResetFD closes a descriptor that was never made a Conn, with RST.
func ResetFD(fd int) {
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}
