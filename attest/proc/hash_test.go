package proc

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// pinned is a handle of a made-up process that executes path.
func pinned(t *testing.T, path string) *Handle {
	t.Helper()
	root := t.TempDir()
	fake(t, root, 7, "100", path)
	h, err := New(root).Open(7)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

func TestSum(t *testing.T) {
	path := program(t, "x")
	want := sha256.Sum256([]byte("#!x"))
	s := NewHasher(4)
	got, err := s.Sum(context.Background(), pinned(t, path))
	if err != nil || got != hex.EncodeToString(want[:]) {
		t.Errorf("sum %s (%v)", got, err)
	}
	// It was written a moment ago, so its times cannot be relied upon yet.
	if len(s.sums) != 0 {
		t.Error("the digest of a file still within timestamp granularity was kept")
	}
}

func TestSumIsKeptAndBounded(t *testing.T) {
	s := NewHasher(2)
	for i := range 5 {
		s.remember(FileID{Inode: uint64(i)}, "x")
	}
	if len(s.sums) != 2 {
		t.Errorf("%d digests kept, want 2", len(s.sums))
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(exe)
	if err != nil || time.Since(fi.ModTime()) < settled {
		exe = "/bin/cat" // our own test binary was just built
	}
	h := pinned(t, exe)
	first, err := s.Sum(context.Background(), h)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // a kept digest needs no reading, so it does not mind
	if again, err := s.Sum(ctx, h); err != nil || again != first {
		t.Errorf("second sum %s (%v), want %s", again, err, first)
	}
}

func TestSumOfHugeFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "huge")
	f, err := os.Create(path)
	if err == nil {
		err = f.Truncate(600 << 20) // sparse
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	start := time.Now()
	if sum, err := NewHasher(4).Sum(context.Background(), pinned(t, path)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("sum %s (%v), want ErrTooLarge", sum, err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("took %v: it must not be read", took)
	}
}

func TestSumIsCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := NewHasher(4).Sum(ctx, pinned(t, program(t, "x"))); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want cancellation", err)
	}
}
