package decisionlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

func newLog(t *testing.T, cfg Config) *Log {
	t.Helper()
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.file.close() })
	return l
}

func record(t *testing.T, l *Log, seq uint32) {
	t.Helper()
	r := sample()
	r.ID.Seq = seq
	if err := l.Record(&r); err != nil {
		t.Fatal(err)
	}
}

// sequence reads the request numbers of a log's lines.
func sequence(t *testing.T, path string) []uint32 {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all []uint32
	for line := range bytes.Lines(text) {
		r, err := ParseRecord(line)
		if err != nil {
			t.Fatalf("%s: %q: %v", path, line, err)
		}
		all = append(all, r.ID.Seq)
	}
	return all
}

func TestRunWritesAndFinishes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := newLog(t, Config{Path: path})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	record(t, l, 1)
	tick, limit := time.NewTicker(time.Millisecond), time.After(20*time.Second)
	defer tick.Stop()
	for l.Status().Written != 1 {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("nothing was written")
		}
	}
	record(t, l, 2)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(sequence(t, path)); got != "[1 2]" {
		t.Errorf("got %s", got)
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if st := l.Status(); st.Recorded != 2 || st.Written != 2 || st.Queued != 0 {
		t.Errorf("%+v", st)
	}
}

func TestFileOfOthers(t *testing.T) {
	dir := t.TempDir()
	loose := filepath.Join(dir, "loose")
	if err := os.WriteFile(loose, []byte("{}\n{\"half"), 0o644); err != nil {
		t.Fatal(err)
	}
	newLog(t, Config{Path: loose})
	if text, _ := os.ReadFile(loose); string(text) != "{}\n" {
		t.Errorf("half a line stays: %q", text)
	}
	if info, _ := os.Stat(loose); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.Symlink(loose, link), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, fifo, dir, "/dev/full", filepath.Join(dir, "absent", "log")} {
		if _, err := New(Config{Path: path}); err == nil {
			t.Errorf("opened %s", path)
		}
	}
}

func TestRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := newLog(t, Config{Path: path, MaxSize: 1500, Backups: 2})
	for i := range uint32(12) {
		record(t, l, i+1)
		if err := l.flush(); err != nil {
			t.Fatal(err)
		}
	}
	var all []uint32
	for _, p := range []string{path + ".2", path + ".1", path} {
		info, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 1500 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %d bytes, %v", p, info.Size(), info.Mode())
		}
		all = append(all, sequence(t, p)...)
	}
	for i, seq := range all {
		if seq != all[0]+uint32(i) {
			t.Fatalf("lines are missing or out of order: %v", all)
		}
	}
	if all[len(all)-1] != 12 {
		t.Errorf("the newest is %d", all[len(all)-1])
	}
	if _, err := os.Stat(path + ".3"); err == nil {
		t.Error("too many backups")
	}
}

func TestNoBackups(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := newLog(t, Config{Path: path, MaxSize: 1, Backups: -1})
	for i := range uint32(3) {
		record(t, l, i+1)
		if err := l.flush(); err != nil {
			t.Fatal(err)
		}
	}
	if got := fmt.Sprint(sequence(t, path)); got != "[3]" {
		t.Errorf("got %s", got)
	}
}

// Another program may move the file aside; what is written next goes to the path.
func TestMovedAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := newLog(t, Config{Path: path})
	record(t, l, 1)
	if err := errors.Join(l.flush(), os.Rename(path, path+".old")); err != nil {
		t.Fatal(err)
	}
	record(t, l, 2)
	if err := l.flush(); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(sequence(t, path+".old"), sequence(t, path)); got != "[1] [2]" {
		t.Errorf("got %s", got)
	}
}

// breakFile makes writes fail, as a read-only descriptor does, and returns the repair.
func breakFile(t *testing.T, l *Log) (repair func()) {
	t.Helper()
	good := l.file.f
	bad, err := os.Open(l.file.path)
	if err != nil {
		t.Fatal(err)
	}
	l.file.f = bad
	return func() {
		l.file.f = good
		_ = bad.Close()
	}
}

func TestFailingDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := newLog(t, Config{Path: path})
	record(t, l, 1)
	repair := breakFile(t, l)
	for range 2 {
		if err := l.flush(); err == nil {
			t.Fatal("a failed write went unnoticed")
		}
	}
	record(t, l, 2)
	if st := l.Status(); st.Failures != 2 || st.LastError == "" || st.Written != 0 || st.Queued == 0 {
		t.Errorf("%+v", st)
	}
	repair()
	if err := l.flush(); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(sequence(t, path)); got != "[1 2]" {
		t.Errorf("got %s", got)
	}
	if st := l.Status(); st.LastError != "" || st.Written != 2 {
		t.Errorf("%+v", st)
	}
}

// While the disk refuses, records are dropped and counted, and memory keeps them.
func TestQueueIsBounded(t *testing.T) {
	l := newLog(t, Config{Path: filepath.Join(t.TempDir(), "log")})
	repair := breakFile(t, l)
	defer repair()
	r, dropped := sample(), 0
	for i := range uint32(20_000) {
		r.ID.Seq = i + 1
		if i%5000 == 0 && l.flush() == nil && i > 0 {
			t.Fatal("flushed")
		}
		if err := l.Record(&r); errors.Is(err, ErrNotRecorded) {
			dropped++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	st := l.Status()
	if dropped == 0 || st.Dropped != uint64(dropped) || st.Queued > maxQueue || st.Recorded != 20_000 {
		t.Errorf("%d dropped: %+v", dropped, st)
	}
	if last := l.Last(Filter{}, 1); len(last) != 1 || last[0].ID.Seq != 20_000 {
		t.Errorf("memory: %+v", last)
	}
}

// A write that was stored in part though it reported failure is undone.
func TestPartialWriteIsUndone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := newLog(t, Config{Path: path})
	record(t, l, 1)
	if err := l.flush(); err != nil {
		t.Fatal(err)
	}
	info, _ := os.Stat(path)
	if _, err := l.file.f.WriteString(`{"half`); err != nil {
		t.Fatal(err)
	}
	l.file.undo(info.Size(), 6)
	record(t, l, 2)
	if err := l.flush(); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(sequence(t, path)); got != "[1 2]" {
		t.Errorf("got %s", got)
	}
	// Where somebody else wrote meanwhile, the half line is closed, not cut.
	info, _ = os.Stat(path)
	if _, err := l.file.f.WriteString("{\"half\n{}"); err != nil {
		t.Fatal(err)
	}
	l.file.undo(info.Size(), 6)
	record(t, l, 3)
	if err := l.flush(); err != nil {
		t.Fatal(err)
	}
	text, _ := os.ReadFile(path)
	if lines := bytes.Split(bytes.TrimSpace(text), []byte("\n")); len(lines) != 5 || string(lines[3]) != "{}" {
		t.Errorf("%q", text)
	} else if r, err := ParseRecord(lines[4]); err != nil || r.ID.Seq != 3 {
		t.Errorf("%q: %v", lines[4], err)
	}
}

func TestFullDisk(t *testing.T) {
	nettest.RequireRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path, ballast := filepath.Join(dir, "log"), filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 48<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLog(t, Config{Path: path})
	t.Cleanup(func() { _ = l.file.close() }) // before the unmount
	for i := range uint32(100) {
		record(t, l, i+1)
	}
	if err := l.flush(); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("got %v", err)
	}
	if n := len(sequence(t, path)); n != 0 {
		t.Errorf("%d lines of a failed write", n)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := l.flush(); err != nil {
		t.Fatal(err)
	}
	if n := len(sequence(t, path)); n != 100 {
		t.Errorf("%d lines after room was made", n)
	}
}

func TestFindAndLast(t *testing.T) {
	l := newLog(t, Config{Keep: 100})
	for i := range uint32(250) {
		r := sample()
		r.ID = authz.ID{Conn: [12]byte{byte(i % 2)}, Seq: i + 1}
		r.Unit, r.Scope = fmt.Sprintf("u%d.service", i%5), fmt.Sprintf("s%d", i%2)
		r.Effect = authz.Effect(i % 3)
		if err := l.Record(&r); err != nil {
			t.Fatal(err)
		}
	}
	if got := l.Last(Filter{}, 1000); len(got) != 100 || got[0].ID.Seq != 250 || got[99].ID.Seq != 151 {
		t.Errorf("%d kept", len(got))
	}
	if got := l.Last(Filter{Unit: "u3.service", Scope: "s1"}, 3); len(got) != 3 || got[0].ID.Seq != 244 || got[1].ID.Seq != 234 {
		t.Errorf("unit: %v", got)
	}
	deny := authz.Deny
	for _, r := range l.Last(Filter{Effect: &deny}, 50) {
		if r.Effect != deny {
			t.Errorf("got %v", r.Effect)
		}
	}
	for _, r := range l.Last(Filter{Refused: true}, 50) {
		if r.Effect == authz.Permit {
			t.Error("a permit")
		}
	}
	if got := l.Find(authz.ID{Conn: [12]byte{1}, Seq: 200}); len(got) != 1 || got[0].ID.Seq != 200 {
		t.Errorf("one: %v", got)
	}
	if got := l.Find(authz.ID{Conn: [12]byte{1}}); len(got) != 50 || got[0].ID.Seq != 152 || got[49].ID.Seq != 250 {
		t.Errorf("connection: %d", len(got))
	}
	if l.Find(authz.ID{Conn: [12]byte{9}}) != nil || l.Last(Filter{Scope: "none"}, 9) != nil || l.Last(Filter{}, 0) != nil {
		t.Error("found what is not there")
	}
	none := newLog(t, Config{Keep: -1})
	record(t, none, 1)
	if none.Last(Filter{}, 1) != nil {
		t.Error("kept in spite of the setting")
	}
}

// Records much longer than usual take room from old ones, not memory from the node.
func TestRingMemoryIsBounded(t *testing.T) {
	l := newLog(t, Config{Keep: 1000})
	r := sample()
	r.Path = "/" + string(bytes.Repeat([]byte("\x01"), 4000))
	for i := range uint32(5000) {
		r.ID.Seq = i + 1
		if err := l.Record(&r); err != nil {
			t.Fatal(err)
		}
	}
	total := 0
	for _, c := range l.ring.chunks {
		total += cap(c)
	}
	if total > 1100*1024 {
		t.Errorf("%d bytes", total)
	}
	if got := l.Last(Filter{}, 1000); len(got) < 50 || got[0].ID.Seq != 5000 {
		t.Errorf("%d kept", len(got))
	}
}

func TestRecordingSettlesWithoutAllocation(t *testing.T) {
	l := newLog(t, Config{Keep: 500})
	r := sample()
	for range 5000 {
		if err := l.Record(&r); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(2000, func() { _ = l.Record(&r) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
