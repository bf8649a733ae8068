package bpf

import (
	"os/exec"
	"testing"

	"github.com/cilium/ebpf"

	"ringfence.dev/test/nettest"
)

// An execve anywhere on the host is seen, under the process's exact start time.
func TestExecID(t *testing.T) {
	i := open(t, scratch(t))
	child := exec.Command("sh", "-c", "read x; exec sleep 60")
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Process.Kill(); child.Wait() })
	pid := uint32(child.Process.Pid)
	find := func() (start, id uint64) {
		var key captureImageKey
		for it := i.Maps.RfExecs.Iterate(); it.Next(&key, &id); {
			if key.Tgid == pid {
				return key.Start, id
			}
		}
		return 0, 0
	}
	var start, first uint64
	nettest.Wait(t, "the shell's execve to be seen", func() bool { start, first = find(); return first != 0 })
	if got, err := i.ExecID(pid, start); err != nil || got != first {
		t.Errorf("exec id %d (%v), want %d", got, err, first)
	}
	if got, err := i.ExecID(pid, start+1); err != nil || got != 0 {
		t.Errorf("another life of the pid has exec id %d (%v)", got, err)
	}
	if _, err := in.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	nettest.Wait(t, "the second execve to be seen", func() bool { id, _ := i.ExecID(pid, start); return id > first })
}

func TestNotesAreTakenOnce(t *testing.T) {
	i := open(t, scratch(t))
	key := ConnKey{Netns: 7, Sport: 1, Dport: 2}
	if _, err := i.TakeNote(key); err != ErrNoEntry {
		t.Fatalf("no note: %v", err)
	}
	want := Note{Dst: [4]uint32{1, 2, 3, 4}, Tgid: 5, Self: [4]uint32{9}}
	if err := i.Maps.RfNotes.Update(key, want, ebpf.UpdateNoExist); err != nil {
		t.Fatal(err)
	}
	if n, err := i.TakeNote(key); err != nil || n != want {
		t.Errorf("%+v (%v)", n, err)
	}
	if _, err := i.TakeNote(key); err != ErrNoEntry {
		t.Errorf("taken twice: %v", err)
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = i.TakeNote(key) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
