package ebpf_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ringfence.dev/test/nettest"
)

// The test binary plays the workload when this variable holds a job.
const helperEnv = "RF_CAPTURE_HELPER"

// job is what a workload does: it opens one socket, prepares and connects or listens.
type job struct {
	Serve  string // listen here instead of dialling
	To     string // dial
	V6     bool   // AF_INET6 even for an IPv4 address
	Type   int    // zero: SOCK_STREAM
	Proto  int
	Bind   string // bind to this first
	Device string
	Mark   int
	How    string // "", "fastopen", "fastopen_connect", "reconnect", "io_uring"
	Join   string // move to this cgroup between socket and connect
	UID    int
	Only   bool // make (and bind) the socket, no more
}

// result is what the workload saw. Step is the call that failed, empty for none.
type result struct {
	Step  string
	Errno syscall.Errno
	Peer  string
	Self  string
	Got   string // what the other side sent until it closed
	PID   int
}

func runHelper(text string) {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		panic(err)
	}
	var r result
	if j.Serve != "" {
		serve(j, &r)
	} else {
		r.do(j)
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
	errors.As(err, &r.Errno)
	return true
}

func (r *result) do(j job) {
	if j.UID != 0 && r.fail("setuid", syscall.Setuid(j.UID)) {
		return
	}
	fd, err := open(j)
	if r.fail("socket", err) {
		return
	}
	defer unix.Close(fd)
	if r.prepare(fd, j) || j.Only {
		return
	}
	if j.Join != "" && r.fail("join", os.WriteFile(j.Join+"/cgroup.procs", []byte(strconv.Itoa(os.Getpid())), 0)) {
		return
	}
	if r.fail("connect", connect(fd, j)) {
		return
	}
	if j.Type == unix.SOCK_DGRAM {
		return
	}
	r.names(fd)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
	buf := make([]byte, 100)
	for {
		n, err := unix.Read(fd, buf)
		if n <= 0 {
			r.fail("read", err)
			return
		}
		r.Got += string(buf[:n])
	}
}

func (r *result) prepare(fd int, j job) bool {
	if j.Device != "" && r.fail("device", unix.BindToDevice(fd, j.Device)) {
		return true
	}
	if j.Mark != 0 && r.fail("mark", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, j.Mark)) {
		return true
	}
	return j.Bind != "" && r.fail("bind", unix.Bind(fd, sockaddr(j.Bind, j.V6)))
}

func (r *result) names(fd int) {
	if sa, err := unix.Getpeername(fd); err == nil {
		r.Peer = text(sa)
	}
	if sa, err := unix.Getsockname(fd); err == nil {
		r.Self = text(sa)
	}
}

func open(j job) (int, error) {
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

func connect(fd int, j job) error {
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
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 1}); err != unix.ECONNREFUSED {
			return err
		}
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

func serve(j job, r *result) {
	fd, err := open(j)
	if r.fail("socket", err) {
		return
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if j.V6 || netip.MustParseAddrPort(j.Serve).Addr().Is6() {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	}
	if r.fail("bind", unix.Bind(fd, sockaddr(j.Serve, j.V6))) || r.fail("listen", unix.Listen(fd, 16)) {
		return
	}
	fmt.Println("listening")
	for {
		c, peer, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if r.fail("accept", err) {
			return
		}
		var seen result
		seen.names(c)
		if seen.Peer != text(peer) {
			seen.Peer = "accept4 says " + text(peer) + ", getpeername " + seen.Peer
		}
		_, _ = unix.Write(c, []byte("app"))
		unix.Close(c)
		seen.print()
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
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)).String()
	}
	return "?"
}

// uringConnect does IORING_OP_CONNECT by hand: one entry, submit, wait. Offsets
// are read from io_uring_params, linux/io_uring.h.
func uringConnect(fd int, sa *unix.SockaddrInet4) error {
	var p [120]byte
	u32 := func(off int) uint32 { return *(*uint32)(unsafe.Pointer(&p[off])) }
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(ring))
	sq, err := unix.Mmap(int(ring), 0, int(u32(64)+u32(0)*4), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	cq, err := unix.Mmap(int(ring), 0x8000000, int(u32(100)+u32(4)*16), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	sqes, err := unix.Mmap(int(ring), 0x10000000, int(u32(0))*64, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	raw := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: sa.Addr}
	port := (*[2]byte)(unsafe.Pointer(&raw.Port))
	port[0], port[1] = byte(sa.Port>>8), byte(sa.Port)
	sqes[0] = 16 // IORING_OP_CONNECT
	*(*int32)(unsafe.Pointer(&sqes[4])) = int32(fd)
	*(*uint64)(unsafe.Pointer(&sqes[8])) = unix.SizeofSockaddrInet4               // off: addrlen
	*(*uint64)(unsafe.Pointer(&sqes[16])) = uint64(uintptr(unsafe.Pointer(&raw))) // addr
	*(*uint32)(unsafe.Pointer(&sq[u32(64)])) = 0                                  // array[0] is entry 0
	*(*uint32)(unsafe.Pointer(&sq[u32(44)])) = 1                                  // tail
	_, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 1, 1, 0, 0)
	if errno != 0 {
		return errno
	}
	res := *(*int32)(unsafe.Pointer(&cq[u32(100)+8]))
	if res < 0 {
		return syscall.Errno(-res)
	}
	return nil
}

// start runs a job as a workload: in the namespace, in the cgroup.
func start(t *testing.T, ns *nettest.NS, cgroup string, j job) (*exec.Cmd, io.ReadCloser) {
	t.Helper()
	text, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, out
}

// run runs a dialling job to its end.
func run(t *testing.T, ns *nettest.NS, cgroup string, j job) (r result) {
	t.Helper()
	cmd, out := start(t, ns, cgroup, j)
	timer := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	if err := json.NewDecoder(out).Decode(&r); err != nil {
		t.Fatalf("workload %+v: %v", j, err)
	}
	return r
}

// server is a workload that accepts, says "app" and reports whom it saw.
type server struct {
	t    *testing.T
	seen *json.Decoder
	cmd  *exec.Cmd
}

func listen(t *testing.T, ns *nettest.NS, cgroup, addr string) *server {
	t.Helper()
	cmd, out := start(t, ns, cgroup, job{Serve: addr})
	line := make([]byte, len("listening\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "listening\n" {
		t.Fatalf("server on %s: %q, %v", addr, line, err)
	}
	return &server{t: t, seen: json.NewDecoder(out), cmd: cmd}
}

// next is the next connection that the server accepted.
func (s *server) next() (r result) {
	s.t.Helper()
	if err := s.seen.Decode(&r); err != nil {
		s.t.Fatalf("server: %v", err)
	}
	return r
}

// stop ends the server and waits until its sockets are closed.
func (s *server) stop() {
	s.t.Helper()
	if err := s.cmd.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	_ = s.cmd.Wait() // killed
}
