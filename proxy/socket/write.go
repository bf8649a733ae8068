package socket

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iovMax is how many spans go into one system call. A message head with edits
// makes about five; more spans only mean another call.
const iovMax = 8

// cursor walks over spans that belong to somebody else without changing them.
type cursor struct {
	spans [][]byte
	span  int // the first span not written in full
	off   int // how much of it is written
	total int
}

func (w *cursor) done() bool { return w.span >= len(w.spans) }

func (w *cursor) advance(n int) {
	w.total += n
	for !w.done() {
		left := len(w.spans[w.span]) - w.off
		if n < left {
			w.off += n
			return
		}
		n -= left
		w.span, w.off = w.span+1, 0
	}
}

// TryWrite writes as much of spans as the kernel takes without waiting and
// returns how many octets that was; a full socket is no error. It neither keeps
// nor changes spans.
func (c *Conn) TryWrite(spans [][]byte) (int, error) {
	c.w, c.werr = cursor{spans: spans}, nil
	err := pollError(c.raw.Control(c.tryFn))
	if err == nil {
		err = c.werr
	}
	n := c.w.total
	c.w = cursor{}
	return n, err
}

// WriteAll writes spans in full, waiting for room as long as the write
// deadline allows. It neither keeps nor changes spans.
func (c *Conn) WriteAll(spans [][]byte) error {
	c.w, c.werr = cursor{spans: spans}, nil
	err := pollError(c.raw.Write(c.writeFn))
	if err == nil {
		err = c.werr
	}
	c.w = cursor{}
	return err
}

// writeNow writes until the socket is full, which a short write shows already.
func (c *Conn) writeNow(fd uintptr) {
	for !c.w.done() {
		if short, done := c.step(fd); short || done {
			return
		}
	}
}

// writeReady writes until all is written, an error, or EAGAIN; only the last
// makes the poller wait, because only then does the kernel promise an edge.
func (c *Conn) writeReady(fd uintptr) bool {
	for !c.w.done() {
		if _, done := c.step(fd); done {
			return c.werr != nil
		}
	}
	return true
}

// step makes one system call. done means that no other may follow: EAGAIN, or an error in werr.
func (c *Conn) step(fd uintptr) (short, done bool) {
	want, n, errno := c.send(fd)
	switch errno {
	case 0:
		c.w.advance(n)
		return n < want, false
	case unix.EAGAIN:
		return false, true
	default:
		c.werr = os.NewSyscallError("send", errno)
		return false, true
	}
}

// send makes one system call with the spans at the cursor. MSG_NOSIGNAL: a
// peer that is gone is an error here, not a signal to the process.
func (c *Conn) send(fd uintptr) (want, n int, errno syscall.Errno) {
	count := 0
	for i := c.w.span; i < len(c.w.spans) && count < iovMax; i++ {
		p := c.w.spans[i]
		if i == c.w.span {
			p = p[c.w.off:]
		}
		if len(p) == 0 {
			continue
		}
		c.iov[count].Base = unsafe.SliceData(p)
		c.iov[count].SetLen(len(p))
		want += len(p)
		count++
	}
	if count == 0 {
		c.w.advance(0)
		return 0, 0, 0
	}
	const flags = unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL
	for {
		var r uintptr
		if count == 1 {
			r, _, errno = syscall.RawSyscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(c.iov[0].Base)),
				uintptr(c.iov[0].Len), flags, 0, 0)
		} else {
			c.msg.Iov = &c.iov[0]
			c.msg.SetIovlen(count)
			r, _, errno = syscall.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&c.msg)), flags)
		}
		if errno == unix.EINTR {
			continue
		}
		clear(c.iov[:count]) // hold no memory of the caller's
		return want, int(r), errno
	}
}
