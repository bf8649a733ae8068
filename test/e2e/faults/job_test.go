package faults_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The test binary plays the workload when this variable holds a job.
const jobEnv = "RF_FAULTS_JOB"

// job is what a workload does: it makes one socket, prepares it, and connects or
// listens. It reports each step as a line of JSON.
type job struct {
	To     string // dial
	Serve  string // listen here instead, say "app", report whom it saw
	V6     bool   // AF_INET6 even for an IPv4 address
	Type   int    // zero: SOCK_STREAM
	Proto  int
	Bind   string // bind to this first
	Reuse  bool   // with SO_REUSEPORT
	Device string
	Mark   int
	How    string // "", fastopen, fastopen_connect, reconnect, io_uring, none
	UID    int
	Given  bool   // use the socket that came as descriptor 3
	Pause  bool   // wait for a line after the socket was made
	Join   string // enter this cgroup between socket and connect
	Only   bool   // make and bind the socket, no more
	Hold   bool   // keep the connection after the first answer, until a line comes
	Send   string
	Wait   time.Duration // that connect may take; zero: as long as the kernel tries
	Leave  bool          // end at once after sending
	Exec   []string      // become this program after sending, the connection on descriptor 3
}

// result is what the workload saw. Step is the call that failed, empty for none.
type result struct {
	Step  string
	Errno syscall.Errno
	Peer  string
	Self  string
	Got   string // what the other side sent, until its end or, holding, the first of it
	PID   int
}

func runJob(text string) {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		panic(err)
	}
	r := &result{}
	if j.Serve != "" {
		r.serve(j)
	} else {
		r.dial(j, bufio.NewReader(os.Stdin))
	}
	r.print()
}

func (r *result) print() {
	r.PID = os.Getpid()
	_ = json.NewEncoder(os.Stdout).Encode(r)
}

func (r *result) fail(step string, err error) bool {
	if err == nil {
		return false
	}
	r.Step = step
	if !errors.As(err, &r.Errno) {
		r.Got = err.Error()
	}
	return true
}

func (r *result) dial(j job, in *bufio.Reader) {
	if j.UID != 0 && r.fail("setuid", syscall.Setuid(j.UID)) {
		return
	}
	fd, err := j.socket()
	if r.fail("socket", err) {
		return
	}
	if j.Pause {
		r.print()
		if _, err := in.ReadString('\n'); r.fail("pause", err) {
			return
		}
	}
	if r.prepare(fd, j) || j.Only {
		return
	}
	if r.fail("connect", j.connect(fd)) {
		return
	}
	if j.Send != "" {
		if _, err := unix.Write(fd, []byte(j.Send)); r.fail("write", err) {
			return
		}
	}
	if j.Leave || j.Type == unix.SOCK_DGRAM {
		return
	}
	if j.Exec != nil {
		r.fail("exec", become(fd, j.Exec))
		return
	}
	r.read(fd, j, in)
}

// become runs another program in this process.
func become(fd int, argv []string) error {
	if err := unix.Dup3(fd, 3, 0); err != nil && fd != 3 {
		return err
	}
	env := []string{jobEnv + "=" + argv[1], "GODEBUG=asyncpreemptoff=1"}
	return syscall.Exec(argv[0], argv[:1], env)
}

func (r *result) read(fd int, j job, in *bufio.Reader) {
	r.names(fd)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
	buf := make([]byte, 100)
	n, err := unix.Read(fd, buf)
	r.Got = string(buf[:max(n, 0)])
	if r.fail("read", err) || n == 0 {
		return
	}
	if j.Hold {
		r.print()
		// Until the test says so, or the other side ends it.
		ended := make(chan struct{})
		go func() {
			_, _ = in.ReadString('\n')
			_ = unix.Shutdown(fd, unix.SHUT_WR)
			close(ended)
		}()
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60})
	} else {
		_ = unix.Shutdown(fd, unix.SHUT_WR)
	}
	for n > 0 && err == nil {
		n, err = unix.Read(fd, buf)
	}
	r.fail("end", err)
}

func (r *result) prepare(fd int, j job) bool {
	if j.Reuse && r.fail("reuse", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)) {
		return true
	}
	if j.Mark != 0 && r.fail("mark", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, j.Mark)) {
		return true
	}
	if j.Device != "" && r.fail("device", unix.BindToDevice(fd, j.Device)) {
		return true
	}
	if j.Bind != "" && r.fail("bind", unix.Bind(fd, sockaddr(j.Bind, j.V6))) {
		return true
	}
	return j.Join != "" && r.fail("join", os.WriteFile(j.Join+"/cgroup.procs", []byte(strconv.Itoa(os.Getpid())), 0))
}

func (r *result) names(fd int) {
	if sa, err := unix.Getpeername(fd); err == nil {
		r.Peer = text(sa)
	}
	if sa, err := unix.Getsockname(fd); err == nil {
		r.Self = text(sa)
	}
}

func (j job) socket() (int, error) {
	if j.Given {
		return 3, nil
	}
	typ, family := j.Type, unix.AF_INET
	if typ == 0 {
		typ = unix.SOCK_STREAM
	}
	for _, a := range []string{j.To, j.Bind, j.Serve} {
		if a != "" && netip.MustParseAddrPort(a).Addr().Is6() {
			family = unix.AF_INET6
		}
	}
	if j.V6 {
		family = unix.AF_INET6
	}
	return unix.Socket(family, typ|unix.SOCK_CLOEXEC, j.Proto)
}

func (j job) connect(fd int) error {
	if j.How == "none" {
		return nil
	}
	if j.Wait != 0 {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, timeval(j.Wait)); err != nil {
			return err
		}
	}
	sa := sockaddr(j.To, j.V6)
	switch j.How {
	case "fastopen":
		return unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, sa)
	case "fastopen_connect":
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1); err != nil {
			return err
		}
		if err := unix.Connect(fd, sa); err != nil {
			return err
		}
		_, err := unix.Write(fd, []byte("x"))
		return err
	case "reconnect": // the first connection, which nobody answers, is dissolved
		_ = unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 1})
		unspec := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), unix.SizeofSockaddrInet4)
		if errno != 0 {
			return errno
		}
	case "io_uring":
		return uringConnect(fd, sa.(*unix.SockaddrInet4))
	}
	return unix.Connect(fd, sa)
}

// serve accepts, says "app", waits for the client's end and reports whom it saw.
func (r *result) serve(j job) {
	fd, err := j.socket()
	if r.fail("socket", err) {
		return
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if r.prepare(fd, j) || r.fail("bind", unix.Bind(fd, sockaddr(j.Serve, j.V6))) || r.fail("listen", unix.Listen(fd, 64)) {
		return
	}
	r.print()
	for {
		c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if r.fail("accept", err) {
			return
		}
		var seen result
		seen.names(c)
		seen.print()
		_, _ = unix.Write(c, []byte("app"))
		go func() {
			_ = unix.SetsockoptTimeval(c, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60})
			buf := make([]byte, 100)
			for n, err := unix.Read(c, buf); n > 0 && err == nil; {
				n, err = unix.Read(c, buf)
			}
			unix.Close(c)
		}()
	}
}

func sockaddr(text string, v6 bool) unix.Sockaddr {
	a := netip.MustParseAddrPort(text)
	if a.Addr().Is4() && !v6 {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func text(sa unix.Sockaddr) string {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)).String()
	}
	return "?"
}

// uringConnect is IORING_OP_CONNECT by hand: one entry, submit, wait. Offsets are
// those of struct io_uring_params and struct io_uring_sqe, linux/io_uring.h.
func uringConnect(fd int, sa *unix.SockaddrInet4) error {
	var params [120]byte
	field := func(off int) uint32 { return *(*uint32)(unsafe.Pointer(&params[off])) }
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(ring))
	const rw = unix.PROT_READ | unix.PROT_WRITE
	sq, err := unix.Mmap(int(ring), 0, int(field(64)+field(0)*4), rw, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	cq, err := unix.Mmap(int(ring), 0x8000000, int(field(100)+field(4)*16), rw, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	entries, err := unix.Mmap(int(ring), 0x10000000, int(field(0))*64, rw, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	raw := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: sa.Addr}
	port := (*[2]byte)(unsafe.Pointer(&raw.Port))
	port[0], port[1] = byte(sa.Port>>8), byte(sa.Port)
	entries[0] = 16 // IORING_OP_CONNECT
	*(*int32)(unsafe.Pointer(&entries[4])) = int32(fd)
	*(*uint64)(unsafe.Pointer(&entries[8])) = unix.SizeofSockaddrInet4
	*(*uint64)(unsafe.Pointer(&entries[16])) = uint64(uintptr(unsafe.Pointer(&raw)))
	*(*uint32)(unsafe.Pointer(&sq[field(64)])) = 0 // array[0]: entry 0
	*(*uint32)(unsafe.Pointer(&sq[field(44)])) = 1 // tail
	if _, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 1, 1, 0, 0); errno != 0 {
		return errno
	}
	if res := *(*int32)(unsafe.Pointer(&cq[field(100)+8])); res < 0 {
		return syscall.Errno(-res)
	}
	return nil
}

// jobLimit is for a machine that is busy with other things.
const jobLimit = 30 * time.Second

func (r result) String() string {
	if r.Step == "" {
		return fmt.Sprintf("got %q from %s", r.Got, r.Peer)
	}
	return fmt.Sprintf("failed in %s with %v, having got %q", r.Step, r.Errno, r.Got)
}

func timeval(d time.Duration) *unix.Timeval {
	tv := unix.NsecToTimeval(int64(d))
	return &tv
}
