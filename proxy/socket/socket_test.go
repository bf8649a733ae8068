package socket_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ringfence.dev/proxy/socket"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// listen opens a plain listening socket and returns its descriptor.
func listen(tb testing.TB, family, backlog int) (int, netip.AddrPort) {
	tb.Helper()
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if family == unix.AF_INET6 {
		sa = &unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16()}
	}
	if err := errors.Join(unix.Bind(fd, sa), unix.Listen(fd, backlog)); err != nil {
		tb.Fatal(err)
	}
	addr, err := socket.LocalAddr(fd)
	if err != nil {
		tb.Fatal(err)
	}
	return fd, addr
}

func dialFD(tb testing.TB, family int) int {
	tb.Helper()
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	return fd
}

// pipe is two connected sockets: one of ours, one of the standard library's.
func pipe(tb testing.TB) (*socket.Conn, *net.TCPConn) {
	tb.Helper()
	fd, addr := listen(tb, unix.AF_INET, 8)
	l, err := socket.Listen(fd, socket.Timeouts{KeepAlive: time.Minute, User: time.Minute})
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial("tcp", addr.String())
	if err != nil {
		tb.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	if want := peer.LocalAddr().(*net.TCPAddr).AddrPort(); a.Remote != want {
		tb.Errorf("remote = %v, want %v", a.Remote, want)
	}
	c, err := socket.New(a.FD)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close(); peer.Close() })
	return c, peer.(*net.TCPConn)
}

func TestAcceptedInheritsOptions(t *testing.T) {
	c, _ := pipe(t)
	for _, opt := range []struct{ level, name, want int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 60_000},
	} {
		err := c.Control(func(fd int) error {
			got, err := unix.GetsockoptInt(fd, opt.level, opt.name)
			if got != opt.want {
				t.Errorf("option %d/%d = %d, want %d", opt.level, opt.name, got, opt.want)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func TestListenRefusesOtherDescriptors(t *testing.T) {
	fd := dialFD(t, unix.AF_INET)
	defer unix.Close(fd)
	if _, err := socket.Listen(fd, socket.Timeouts{}); err == nil {
		t.Error("a socket that does not listen was taken")
	}
	if _, err := socket.Listen(-1, socket.Timeouts{}); err == nil {
		t.Error("a bad descriptor was taken")
	}
}

func TestReadSizesAndEOF(t *testing.T) {
	c, peer := pipe(t)
	go func() {
		_, _ = peer.Write(bytes.Repeat([]byte("x"), 300_000))
		_ = peer.CloseWrite()
	}()
	total, largest := 0, 0
	for {
		b, err := c.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		total += len(b.Bytes)
		largest = max(largest, len(b.Bytes))
		b.Free()
	}
	if total != 300_000 {
		t.Errorf("read %d octets", total)
	}
	if largest <= socket.Small.Size() {
		t.Errorf("largest read was %d: bulk never got a large buffer", largest)
	}
}

func TestTryWriteNeverWaits(t *testing.T) {
	c, peer := pipe(t)
	block := bytes.Repeat([]byte("0123456789"), 10_000)
	spans := [][]byte{block[:7], nil, block[7:40_000], block[40_000:]}
	sent := 0
	for {
		n, err := c.TryWrite(spans)
		if err != nil {
			t.Fatal(err)
		}
		sent += n
		if n < len(block) {
			break // full
		}
	}
	if n, err := c.TryWrite([][]byte{block}); err != nil || n == len(block) {
		t.Fatalf("write to a full socket: %d, %v", n, err)
	} else {
		sent += n
	}
	_ = c.CloseWrite()
	got, err := io.Copy(io.Discard, peer)
	if err != nil || int(got) != sent {
		t.Errorf("peer got %d octets (%v), %d were taken", got, err, sent)
	}
}

func TestWriteAllWaitsAndKeepsOrder(t *testing.T) {
	c, peer := pipe(t)
	var spans [][]byte
	var want bytes.Buffer
	for i := range 3000 { // more spans than fit one call, more octets than fit the socket
		p := bytes.Repeat([]byte{byte(i)}, i%2000)
		spans = append(spans, p)
		want.Write(p)
	}
	done := make(chan error, 1)
	go func() {
		err := c.WriteAll(spans)
		_ = c.CloseWrite()
		done <- err
	}()
	got, err := io.ReadAll(peer)
	if err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("got %d octets (%v), want %d", len(got), err, want.Len())
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestResetIsRST(t *testing.T) {
	c, peer := pipe(t)
	c.Reset()
	c.Reset()
	if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("peer reads %v, want a reset", err)
	}
	if _, err := c.Read(); !errors.Is(err, socket.ErrClosed) {
		t.Errorf("Read after Reset: %v", err)
	}
	if !c.Closed() {
		t.Error("not closed")
	}
}

func TestPeerResetIsSeen(t *testing.T) {
	c, peer := pipe(t)
	_ = peer.SetLinger(0)
	peer.Close()
	if _, err := c.Read(); !socket.IsReset(err) {
		t.Errorf("Read = %v, want a reset", err)
	}
}

func TestCloseAndDeadlineEndWaits(t *testing.T) {
	c, _ := pipe(t)
	got := make(chan error, 1)
	go func() { _, err := c.Read(); got <- err }()
	_ = c.SetDeadline(time.Unix(1, 0))
	if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read past its deadline: %v", err)
	}
	_ = c.SetDeadline(time.Time{})
	go func() { _, err := c.Read(); got <- err }()
	c.Close()
	if err := <-got; !errors.Is(err, socket.ErrClosed) {
		t.Errorf("Read on a closed socket: %v", err)
	}
	if err := c.WriteAll([][]byte{{1}}); !errors.Is(err, socket.ErrClosed) {
		t.Errorf("WriteAll on a closed socket: %v", err)
	}
	if _, err := c.TryWrite([][]byte{{1}}); !errors.Is(err, socket.ErrClosed) {
		t.Errorf("TryWrite on a closed socket: %v", err)
	}
}

func TestConnect(t *testing.T) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		_, addr := listen(t, family, 8)
		c, err := socket.Connect(t.Context(), dialFD(t, family), addr)
		if err != nil {
			t.Fatal(err)
		}
		if c.RemoteAddr() != addr || c.LocalAddr().Addr() != addr.Addr() {
			t.Errorf("connected %v to %v, want %v", c.LocalAddr(), c.RemoteAddr(), addr)
		}
		c.Close()
	}
}

func TestConnectRefused(t *testing.T) {
	fd, addr := listen(t, unix.AF_INET, 1)
	unix.Shutdown(fd, unix.SHUT_RDWR)
	if _, err := socket.Connect(t.Context(), dialFD(t, unix.AF_INET), addr); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("Connect = %v, want ECONNREFUSED", err)
	}
}

// A listener whose queue is full drops SYNs, which is what a black hole looks like.
func TestConnectEndsWithContext(t *testing.T) {
	_, addr := listen(t, unix.AF_INET, 0)
	for i := 0; ; i++ {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		c, err := socket.Connect(ctx, dialFD(t, unix.AF_INET), addr)
		cancel()
		if err == nil {
			t.Cleanup(func() { c.Close() })
			if i > 10 {
				t.Fatal("the queue does not fill")
			}
			continue
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Connect = %v, want the context's error", err)
		}
		return
	}
}

func TestListenerClose(t *testing.T) {
	fd, _ := listen(t, unix.AF_INET, 8)
	l, err := socket.Listen(fd, socket.Timeouts{})
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() { _, err := l.Accept(); got <- err }()
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Error(err)
	}
	if err := <-got; !errors.Is(err, socket.ErrClosed) {
		t.Errorf("Accept on a closed listener: %v", err)
	}
	if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on != 1 {
		t.Error("closing our copy stopped the caller's")
	}
}

func TestNoAllocations(t *testing.T) {
	c, peer := pipe(t)
	msg := []byte("0123456789")
	spans := [][]byte{msg[:3], msg[3:]}
	in := make([]byte, len(msg))
	var wg sync.WaitGroup
	defer wg.Wait()
	allocs := testing.AllocsPerRun(200, func() {
		if _, err := peer.Write(msg); err != nil {
			t.Fatal(err)
		}
		b, err := c.Read()
		if err != nil {
			t.Fatal(err)
		}
		b.Free()
		if _, err := c.TryWrite(spans); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(peer, in); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 0 && !raceEnabled {
		t.Errorf("%v allocations per read and write", allocs)
	}
}
