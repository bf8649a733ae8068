package proc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func listen(t *testing.T) (*os.File, uint64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return f, st.Ino
}

func TestHolders(t *testing.T) {
	f, ino := listen(t)
	cmd := exec.Command("/bin/cat") // inherits the socket as descriptor 3
	cmd.ExtraFiles = []*os.File{f}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); cmd.Wait() }()
	fs := New("")
	found, err := fs.FindHolders(context.Background(), ino, nil)
	if err != nil {
		t.Fatal(err)
	}
	var pids []uint32
	for _, h := range found {
		pids = append(pids, h.PID)
		if !fs.Holds(h, ino) || fs.Holds(h, ino+1<<40) || h.StartTime == 0 {
			t.Errorf("holder %+v does not hold", h)
		}
	}
	slices.Sort(pids)
	want := []uint32{uint32(os.Getpid()), uint32(cmd.Process.Pid)}
	slices.Sort(want)
	if !slices.Equal(pids, want) {
		t.Errorf("holders %v, want %v", pids, want)
	}
	if own, err := fs.Sockets(uint32(os.Getpid())); err != nil || !slices.Contains(own, ino) {
		t.Errorf("own sockets %v (%v) lack %d", own, err, ino)
	}
}

func TestHoldersOfNothing(t *testing.T) {
	if got, err := Holders(0); err == nil {
		t.Errorf("inode 0 is held by %v", got)
	}
	// Who may not read every table cannot say that nobody has the socket.
	got, err := Holders(1 << 60)
	if len(got) != 0 || (err != nil) != (os.Geteuid() != 0) || err != nil && !errors.Is(err, unix.EACCES) {
		t.Errorf("holders %v (%v), want none", got, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := New("").FindHolders(ctx, 1, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled search: %v", err)
	}
}

// TestMangledTree: a descriptor table with odd entries is no reason to fail.
func TestMangledTree(t *testing.T) {
	root := t.TempDir()
	fake(t, root, 7, "100", program(t, "x"))
	if err := os.MkdirAll(root+"/7/fd", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"0": "socket:[12]", "1": "socket:[1", "x": "socket:[1]", "9": "pipe:[1]", "12": "socket:[1]"} {
		if err := os.Symlink(to, root+"/7/fd/"+name); err != nil {
			t.Fatal(err)
		}
	}
	os.Remove(root + "/7/fd/x")
	found, err := New(root).FindHolders(context.Background(), 1, nil)
	if err != nil || len(found) != 1 || found[0].FD != 12 {
		t.Errorf("found %+v (%v)", found, err)
	}
}

// A thread can have a descriptor table that /proc/PID/fd does not show.
func TestHolderIsAThread(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "inside-thread")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); cmd.Wait() }()
	var ino uint64
	if _, err := fmt.Fscan(out, &ino); err != nil {
		t.Fatal(err)
	}
	fs, pid := New(""), uint32(cmd.Process.Pid)
	if own, err := fs.Sockets(pid); err != nil || slices.Contains(own, ino) {
		t.Fatalf("the main thread has the socket too (%v)", err)
	}
	found, err := fs.FindHolders(context.Background(), ino, []uint32{pid})
	if err != nil || len(found) != 1 || found[0].PID != pid {
		t.Errorf("holders %+v (%v), want %d", found, err, pid)
	}
}

// hold is the program of TestHolderIsAThread: it makes a socket in a thread with
// a table of its own, tells the inode number, and waits for the end of its input.
func hold() error {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() { // the main thread's table is the one that shows
		err := make(chan error)
		go func() { err <- hold() }()
		return <-err
	}
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	fmt.Println(st.Ino)
	_, err = unix.Read(0, make([]byte, 1))
	return err
}
