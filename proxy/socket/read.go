package socket

import (
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read waits until there is something to read and returns it in a borrowed
// buffer, which the caller frees. While it waits no buffer is held. At the
// peer's FIN it returns [io.EOF].
//
// Reads begin with a small buffer; one that fills it makes the next one large,
// and one that would have fitted a small buffer goes back.
func (c *Conn) Read() (*Buffer, error) {
	c.rerr = nil
	err := pollError(c.raw.Read(c.readFn))
	b := c.buf
	c.buf = nil
	if err == nil {
		err = c.rerr
	}
	if err != nil {
		b.Free()
		return nil, err
	}
	n := len(b.Bytes)
	if n == b.class.Size() {
		c.class = Large
	} else if n <= classSize[Small] {
		c.class = Small
	}
	return b, nil
}

// readReady is called by the poller: first at once, then whenever the socket
// may have become readable. The buffer goes back to the pool before every wait.
func (c *Conn) readReady(fd uintptr) bool {
	b := Borrow(c.class)
	n, errno := recv(fd, b.Room())
	switch {
	case errno == unix.EAGAIN:
		b.Free()
		return false
	case errno != 0:
		c.rerr = os.NewSyscallError("recv", errno)
	case n == 0:
		c.rerr = io.EOF
	default:
		b.Grow(n)
	}
	c.buf = b
	return true
}

// recv is not announced to the scheduler: a non-blocking receive is over before
// the announcement would pay, and it is made once or twice per request.
func recv(fd uintptr, p []byte) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, fd,
			uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		return int(n), errno
	}
}
