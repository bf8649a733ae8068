package iptables

import (
	"context"
	"net"
	"os"
	"os/exec"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/attest/workload"
	"ringfence.dev/test/nettest"
)

// ownSocket is a socket that this process holds, as the kernel describes it.
func ownSocket(t testing.TB) (*os.File, sockdiag.Socket) {
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
	return f, sockdiag.Socket{Inode: st.Ino, UID: 7}
}

func testCallers(t testing.TB) *callers {
	t.Helper()
	nettest.RequireRoot(t)
	b, err := New(context.Background(), Config{})
	if err != nil {
		t.Fatal(err)
	}
	return b.callers
}

func pids(holders []proc.Holder) (list []int) {
	for _, h := range holders {
		list = append(list, int(h.PID))
	}
	slices.Sort(list)
	return list
}

// Whatever was true before, an answer is what /proc says now.
func TestHoldersAreReadEachTime(t *testing.T) {
	c := testCallers(t)
	f, s := ownSocket(t)
	s.CgroupID = mustID(t, c, cg.agent)
	g := group{s.CgroupID, s.UID}
	for range 2 {
		found, err := c.holders(t.Context(), s)
		if err != nil || !slices.Equal(pids(found), []int{os.Getpid()}) || found[0].StartTime == 0 {
			t.Fatalf("holders = %+v, %v", found, err)
		}
	}
	if again := c.again(g, s.Inode, nil); len(again) != 1 {
		t.Errorf("the former caller is not tried first: %+v", again)
	}
	// A process that never called, and one that is gone, are in the way of nobody.
	idle := exec.Command("/bin/sleep", "60")
	if err := idle.Start(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{1, idle.Process.Pid} {
		h := proc.Holder{FD: int(f.Fd())}
		h.Process = processOf(t, c, pid)
		c.remember(g, h)
	}
	_ = idle.Process.Kill()
	_ = idle.Wait()
	if len(c.groups[g]) != 3 {
		t.Fatalf("%d candidates", len(c.groups[g]))
	}
	if found, err := c.holders(t.Context(), s); err != nil || !slices.Equal(pids(found), []int{os.Getpid()}) {
		t.Errorf("holders = %+v, %v", found, err)
	}
	// Nor is one whose number another process has by now.
	h := proc.Holder{FD: int(f.Fd())}
	h.Process = processOf(t, c, 1)
	h.StartTime += 1e9
	if x, err := c.open(h); err == nil {
		t.Errorf("candidate of a recycled number: %+v", x)
	}
	f.Close()
	if found, err := c.holders(t.Context(), s); err != nil || len(found) != 0 {
		t.Errorf("holders of a closed socket = %+v, %v", found, err)
	}
}

// A socket that a child has inherited has two holders, known caller or not.
func TestInheritedSocketHasTwoHolders(t *testing.T) {
	c := testCallers(t)
	f, s := ownSocket(t)
	s.CgroupID = mustID(t, c, cg.agent)
	if found, err := c.holders(t.Context(), s); err != nil || len(found) != 1 {
		t.Fatalf("holders = %+v, %v", found, err)
	}
	for name, give := range map[string]func(*exec.Cmd){
		"as standard input": func(cmd *exec.Cmd) { cmd.Stdin = f },
		"under its number": func(cmd *exec.Cmd) {
			for len(cmd.ExtraFiles) <= int(f.Fd())-3 {
				cmd.ExtraFiles = append(cmd.ExtraFiles, f)
			}
		},
	} {
		cmd := exec.Command("/bin/sleep", "60")
		give(cmd)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		want := []int{os.Getpid(), cmd.Process.Pid}
		slices.Sort(want)
		found, err := c.holders(t.Context(), s)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err != nil || !slices.Equal(pids(found), want) {
			t.Errorf("%s: holders = %v, %v, want %v", name, pids(found), err, want)
		}
	}
}

// Kernels before 5.9 do not tell a socket's cgroup.
func TestHoldersWithoutCgroup(t *testing.T) {
	c := testCallers(t)
	_, s := ownSocket(t)
	for range 2 {
		if found, err := c.holders(t.Context(), s); err != nil || !slices.Equal(pids(found), []int{os.Getpid()}) {
			t.Errorf("holders = %+v, %v", found, err)
		}
	}
}

// Who calls chooses what is remembered, and must not choose how much.
func TestCallersAreBounded(t *testing.T) {
	c := testCallers(t)
	defer c.close()
	self := proc.Holder{Process: processOf(t, c, os.Getpid())}
	for i := range 2 * maxKept {
		c.remember(group{uint64(i + 2), 0}, self)
		if c.kept > maxKept || len(c.groups) > maxGroups {
			t.Fatalf("%d groups, %d kept", len(c.groups), c.kept)
		}
	}
	c.close()
	if n := len(c.groups); n != 0 || c.kept != 0 {
		t.Errorf("%d groups, %d kept after close", n, c.kept)
	}
	g := group{1, 1}
	for self.FD = range 2 * maxHints {
		c.remember(g, self)
	}
	all := c.groups[g]
	if len(all) != 1 || len(all[0].fds) != maxHints {
		t.Fatalf("%d candidates", len(all))
	}
	if o := order(len(all[0].fds)); len(o) != maxHints || o[0] != maxHints-1 || o[1] != maxHints-2 || o[2] != 0 {
		t.Errorf("order %v", o)
	}
	if len(order(0)) != 0 || len(order(1)) != 1 {
		t.Error("order of few")
	}
}

func processOf(t testing.TB, c *callers, pid int) workload.Process {
	t.Helper()
	h, err := c.procs.Open(uint32(pid))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	st, err := h.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return st.Process
}

func mustID(t testing.TB, c *callers, path string) uint64 {
	t.Helper()
	id, err := c.tree.ID(path)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func BenchmarkHolders(b *testing.B) {
	c := testCallers(b)
	var last sockdiag.Socket
	for range 64 {
		_, last = ownSocket(b)
	}
	last.CgroupID = mustID(b, c, cg.agent)
	b.ReportAllocs()
	for b.Loop() {
		if found, err := c.holders(b.Context(), last); err != nil || len(found) != 1 {
			b.Fatal(found, err)
		}
	}
}
