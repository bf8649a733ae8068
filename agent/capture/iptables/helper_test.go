package iptables

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/test/nettest"
)

// dialLimit is how long a workload waits for its connection. A SYN that is
// dropped is sent again after one second.
const dialLimit = 3 * time.Second

// helper is a workload. It prints what its peer sends, or why there was nothing.
func helper(args []string) int {
	switch args[0] {
	case "dial": // ADDRESS [OPTION=VALUE...]
		fmt.Println(dial(args[1], args[2:]...))
	case "hold": // ADDRESS: connect, say so, echo standard input through the connection
		return hold(args[1])
	case "listen": // ADDRESS [transparent]: serve a banner to everybody
		return listen(args[1], len(args) > 2)
	case "raw": // FROM TO TEXT
		fmt.Println(raw(args[1], args[2], args[3]))
	case "guard":
		conn, err := OpenGuardFD()
		if err == nil {
			err = RunGuard(context.Background(), conn, slog.New(slog.NewTextHandler(os.Stderr, nil)))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return 0
}

func dial(addr string, options ...string) string {
	d := net.Dialer{Timeout: dialLimit}
	d.Control = func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = setOptions(int(fd), options) })
		return errors.Join(cerr, err)
	}
	for _, o := range options {
		if name, value, _ := strings.Cut(o, "="); name == "from" {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(value))
		} else if name == "mptcp" {
			d.SetMultipathTCP(true)
		}
	}
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		return failure(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(dialLimit))
	text, err := io.ReadAll(conn)
	if err != nil {
		return failure(err)
	}
	return string(text)
}

func setOptions(fd int, options []string) error {
	for _, o := range options {
		name, value, _ := strings.Cut(o, "=")
		n, _ := strconv.ParseUint(value, 0, 32)
		switch name {
		case "mark":
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(n)); err != nil {
				return err
			}
		case "device":
			if err := unix.BindToDevice(fd, value); err != nil {
				return err
			}
		case "from":
			// Two sockets may have one source port if both say so before they bind.
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
				return err
			}
		}
	}
	return nil
}

func failure(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return "refused"
	case errors.Is(err, unix.ECONNRESET):
		return "reset"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return err.Error()
}

func hold(addr string) int {
	conn, err := net.DialTimeout("tcp", addr, dialLimit)
	if err != nil {
		fmt.Println(failure(err))
		return 1
	}
	fmt.Println("connected")
	go func() { _, _ = io.Copy(conn, os.Stdin) }()
	_, _ = io.Copy(os.Stdout, conn)
	return 0
}

func listen(addr string, transparent bool) int {
	lc := net.ListenConfig{}
	if transparent {
		lc.Control = func(network, _ string, c syscall.RawConn) error {
			family := unix.AF_INET
			if network == "tcp6" {
				family = unix.AF_INET6
			}
			var err error
			cerr := c.Control(func(fd uintptr) { err = ListenControl(0, family, int(fd)) })
			return errors.Join(cerr, err)
		}
	}
	l, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("ready")
	for {
		conn, err := l.Accept()
		if err != nil {
			return 1
		}
		fmt.Fprintf(conn, "workload %s", addr)
		conn.Close()
	}
}

// command is a workload in a cgroup and a namespace, not yet started.
func command(t *testing.T, cgroupPath string, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(filepath.Join(cg.root, cgroupPath))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	cmd := exec.Command(exe, args...)
	// The race detector would have each helper sleep for a second at its end.
	cmd.Env = append(os.Environ(), helperEnv+"=1", "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return cmd
}

// runAs runs a helper to its end and returns what it printed and its pid.
func runAs(t *testing.T, ns *nettest.NS, cgroupPath string, args ...string) (string, int) {
	t.Helper()
	cmd := command(t, cgroupPath, args...)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if err := cmd.Wait(); err != nil {
		t.Fatalf("workload %v: %v: %s", args, err, out.String())
	}
	return strings.TrimSpace(out.String()), pid
}

// daemon is a helper that goes on until the test ends.
type daemon struct {
	in   io.WriteCloser
	out  *bufio.Reader
	cmd  *exec.Cmd
	stop func()
}

// start starts a helper and waits for its first line, which it returns.
func start(t *testing.T, ns *nettest.NS, cmd *exec.Cmd) (*daemon, string) {
	t.Helper()
	d := &daemon{cmd: cmd}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	d.in, d.out = in, bufio.NewReader(out)
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	stopped := false
	d.stop = func() {
		if !stopped {
			stopped = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(d.stop)
	line, err := d.out.ReadString('\n')
	if err != nil {
		t.Fatalf("helper %v ended: %v", cmd.Args[1:], err)
	}
	return d, strings.TrimSpace(line)
}

// serveWorkload starts a listening workload.
func serveWorkload(t *testing.T, ns *nettest.NS, cgroupPath, addr string, more ...string) *daemon {
	t.Helper()
	d, line := start(t, ns, command(t, cgroupPath, append([]string{"listen", addr}, more...)...))
	if line != "ready" {
		t.Fatalf("listen on %s: %s", addr, line)
	}
	return d
}

// probeSYN starts a connection and does not wait for it.
func probeSYN(addr string) string {
	to := netip.MustParseAddrPort(addr)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	if errors.Is(err, unix.EINPROGRESS) {
		return "in progress"
	}
	return fmt.Sprint(err)
}
