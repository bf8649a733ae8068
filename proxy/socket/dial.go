package socket

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Connect connects fd, a prepared non-blocking TCP socket, to an address and
// takes it over: on error it is closed. It returns within ctx. The error
// matches the kernel's errno, such as [unix.ECONNREFUSED], or ctx's error.
func Connect(ctx context.Context, fd int, to netip.AddrPort) (*Conn, error) {
	sa := sockaddr(Family(to.Addr()), to)
	err := connect(fd, sa)
	if err == unix.EINPROGRESS {
		// Over loopback the handshake is over by now, and asking once more is
		// cheaper than a turn through the poller.
		err = connect(fd, sa)
	}
	if err != nil && err != unix.EALREADY && err != unix.EINPROGRESS && err != unix.EISCONN {
		unix.Close(fd)
		return nil, fmt.Errorf("connect %s: %w", to, err)
	}
	c, newErr := New(fd)
	if newErr != nil {
		return nil, newErr
	}
	if err == nil || err == unix.EISCONN {
		return c, nil
	}
	if err := c.awaitConnected(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("connect %s: %w", to, err)
	}
	return c, nil
}

func connect(fd int, sa unix.Sockaddr) error {
	for {
		if err := unix.Connect(fd, sa); err != unix.EINTR {
			return err
		}
	}
}

// past is a deadline that has gone by, to wake whoever waits.
var past = time.Unix(1, 0)

func (c *Conn) awaitConnected(ctx context.Context) error {
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { _ = c.SetWriteDeadline(past) })
		defer stop()
	}
	var result error
	err := c.raw.Write(func(fd uintptr) bool {
		state, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			result = os.NewSyscallError("getsockopt", err)
			return true
		}
		if state != 0 {
			result = unix.Errno(state)
			return true
		}
		// No error yet: connected once there is a peer.
		_, err = unix.Getpeername(int(fd))
		return err == nil
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return pollError(err)
	}
	return result
}

// Timeouts bound how long a silent peer keeps a socket. The zero value sets nothing.
type Timeouts struct {
	// KeepAlive is how long a connection is idle before the first probe, and
	// between probes; zero means no keep-alive. Resolution 1 s.
	KeepAlive time.Duration
	// User is how long sent data may stay unacknowledged (RFC 5482,
	// TCP_USER_TIMEOUT), and how long keep-alive probes may stay unanswered;
	// zero means the kernel's default. Resolution 1 ms.
	User time.Duration
}

// Tune sets TCP_NODELAY, keep-alive and TCP_USER_TIMEOUT on fd. On a listening
// socket it does so for every connection accepted from it, at no further cost:
// Linux hands all of them down.
func Tune(fd int, t Timeouts) error {
	set := func(level, name, value int) error {
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, name, value))
	}
	if err := set(unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	if seconds := int(t.KeepAlive / time.Second); seconds > 0 {
		if err := set(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1); err != nil {
			return err
		}
		if err := set(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds); err != nil {
			return err
		}
		if err := set(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds); err != nil {
			return err
		}
	}
	if ms := int(t.User / time.Millisecond); ms > 0 {
		return set(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, ms)
	}
	return nil
}
