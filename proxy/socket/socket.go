// Package socket is a TCP socket on the runtime's poller without the costs of
// net.Conn: no allocation per read or write, a read that borrows its buffer
// only when there is something to read (an idle connection holds none), a
// gathering write that never waits, and a reset that really sends RST.
//
// It is for the relay and the tunnel, which own their descriptors and know who
// reads and who writes. It is not for general use: at most one goroutine reads
// and at most one writes at a time, and the callers see to that.
//
// This is the one package below proxy that makes raw system calls.
package socket

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrClosed reports use of a Conn or Listener after Close or Reset.
var ErrClosed = os.ErrClosed

// Conn is one TCP socket. Close, Reset, CloseWrite and the setters may be
// called from any goroutine; see the package comment for reads and writes.
type Conn struct {
	// Set by New, then read-only.
	file      *os.File
	raw       syscall.RawConn
	readFn    func(fd uintptr) bool
	writeFn   func(fd uintptr) bool
	tryFn     func(fd uintptr)
	finalOnce atomic.Bool // the first of Close and Reset wins

	// Owned by the reader, no lock.
	class Class
	buf   *Buffer
	rerr  error

	// Owned by the writer, no lock.
	w    cursor // what is still to write
	werr error
	iov  [iovMax]unix.Iovec
	msg  unix.Msghdr
}

// New takes over fd, a non-blocking TCP socket, and registers it with the
// runtime's poller. On error fd is closed.
func New(fd int) (*Conn, error) {
	f := os.NewFile(uintptr(fd), "tcp")
	if f == nil {
		return nil, fmt.Errorf("socket: bad descriptor %d", fd)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	c := &Conn{file: f, raw: raw}
	c.readFn, c.writeFn, c.tryFn = c.readReady, c.writeReady, c.writeNow
	return c, nil
}

// Close closes the socket the ordinary way: what was written is still
// delivered, then FIN. Goroutines that wait in it return ErrClosed. It may be
// called twice.
func (c *Conn) Close() error {
	if !c.finalOnce.CompareAndSwap(false, true) {
		return nil
	}
	return c.file.Close()
}

// Reset closes the socket with RST, dropping what was not delivered. It may be
// called twice; after Close it does nothing.
func (c *Conn) Reset() {
	if !c.finalOnce.CompareAndSwap(false, true) {
		return
	}
	_ = c.control(func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	})
	_ = c.file.Close()
}

// Closed reports whether Close or Reset was called.
func (c *Conn) Closed() bool { return c.finalOnce.Load() }

// CloseWrite sends FIN after what was written; reading goes on.
func (c *Conn) CloseWrite() error {
	return c.control(func(fd int) error {
		return os.NewSyscallError("shutdown", unix.Shutdown(fd, unix.SHUT_WR))
	})
}

// SetDeadline makes reads and writes that wait past t fail with
// [os.ErrDeadlineExceeded]; the zero time means never.
func (c *Conn) SetDeadline(t time.Time) error { return c.file.SetDeadline(t) }

// SetReadDeadline is SetDeadline for reads only.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.file.SetReadDeadline(t) }

// SetWriteDeadline is SetDeadline for writes that wait.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.file.SetWriteDeadline(t) }

// Control runs fn with the descriptor, which stays open meanwhile.
func (c *Conn) Control(fn func(fd int) error) error { return c.control(fn) }

func (c *Conn) control(fn func(fd int) error) error {
	var inner error
	if err := c.raw.Control(func(fd uintptr) { inner = fn(int(fd)) }); err != nil {
		return pollError(err)
	}
	return inner
}

// pollError names what the poller says: a deadline that passed, or else a
// descriptor that is closed, for which os has an error but does not use it here.
func pollError(err error) error {
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return ErrClosed
}

// LocalAddr is the socket's own address, never v4-mapped; invalid once closed.
func (c *Conn) LocalAddr() netip.AddrPort {
	var addr netip.AddrPort
	_ = c.control(func(fd int) (err error) {
		addr, err = LocalAddr(fd)
		return err
	})
	return addr
}

// RemoteAddr is the peer's address, never v4-mapped; invalid when not connected.
func (c *Conn) RemoteAddr() netip.AddrPort {
	var addr netip.AddrPort
	_ = c.control(func(fd int) error {
		sa, err := unix.Getpeername(fd)
		addr = addrPort(sa)
		return err
	})
	return addr
}

// LocalAddr is the address that fd is bound to, never v4-mapped.
func LocalAddr(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
	}
	return addrPort(sa), nil
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(withZone(sa.Addr, sa.ZoneId), uint16(sa.Port))
	default:
		return netip.AddrPort{}
	}
}

// IsReset reports whether err means that the peer sent RST (or that the
// kernel gave up on it), as opposed to an orderly end.
func IsReset(err error) bool {
	return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) ||
		errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.ECONNABORTED)
}
