package keystore_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"ringfence.dev/ca/keystore"
	"ringfence.dev/ca/keystore/keystoretest"
	"ringfence.dev/test/nettest"
)

func newDir(t *testing.T) *keystore.Dir {
	t.Helper()
	d, err := keystore.Make(filepath.Join(t.TempDir(), "a", "state"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func mustWrite(t *testing.T, d *keystore.Dir, name, data string) {
	t.Helper()
	if err := d.Write(name, []byte(data)); err != nil {
		t.Fatal(err)
	}
}

func wantContent(t *testing.T, d *keystore.Dir, name, want string) {
	t.Helper()
	got, err := d.Read(name)
	if err != nil || string(got) != want {
		t.Fatalf("Read(%s) = %q, %v; want %q", name, got, err, want)
	}
}

func TestModes(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	d := newDir(t)
	mustWrite(t, d, "key", "x")
	if err := d.Create("once", []byte("y")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{d.Path(): 0o700, d.Join("key"): 0o600, d.Join("once"): 0o600} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %v (%v), want %v", path, info.Mode().Perm(), err, want)
		}
	}
}

// Each case makes the file "key" unsafe; the message must name the way out.
func TestUnsafeFilesAreRefused(t *testing.T) {
	cases := []struct {
		name string
		root bool
		harm func(path string) error
		hint string
	}{
		{"group may read", false, func(p string) error { return os.Chmod(p, 0o640) }, "chmod 0600 "},
		{"others may read", false, func(p string) error { return os.Chmod(p, 0o604) }, "chmod 0600 "},
		{"others may write", false, func(p string) error { return os.Chmod(p, 0o602) }, "chmod 0600 "},
		{"foreign owner", true, func(p string) error { return os.Chown(p, 12345, -1) }, "chown 0 "},
		{"symbolic link", false, func(p string) error {
			return errors.Join(os.Rename(p, p+".real"), os.Symlink(p+".real", p))
		}, "symbolic link"},
		{"fifo", false, func(p string) error { return errors.Join(os.Remove(p), syscall.Mkfifo(p, 0o600)) }, "not a regular file"},
		{"directory", false, func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) }, "not a regular file"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.root {
				nettest.RequireRoot(t)
			}
			d := newDir(t)
			mustWrite(t, d, "key", "secret")
			if err := c.harm(d.Join("key")); err != nil {
				t.Fatal(err)
			}
			data, err := d.Read("key")
			if !errors.Is(err, keystore.ErrUnsafe) || data != nil {
				t.Fatalf("Read = %q, %v; want ErrUnsafe", data, err)
			}
			if !strings.Contains(err.Error(), c.hint) || strings.Contains(err.Error(), "secret") {
				t.Errorf("error %q should hold %q and no content", err, c.hint)
			}
		})
	}
}

func TestUnsafeDirectoriesAreRefused(t *testing.T) {
	d := newDir(t)
	if err := os.Chmod(d.Path(), 0o750); err != nil {
		t.Fatal(err)
	}
	for _, open := range []func(string) (*keystore.Dir, error){keystore.Open, keystore.Make} {
		if _, err := open(d.Path()); !errors.Is(err, keystore.ErrUnsafe) || !strings.Contains(err.Error(), "chmod 0700 ") {
			t.Errorf("group-readable directory: %v", err)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := keystore.Make(file); err == nil {
		t.Error("a file was opened as a directory")
	}
	if _, err := keystore.Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, keystore.ErrNotExist) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
}

func TestForeignDirectoryIsRefused(t *testing.T) {
	nettest.RequireRoot(t)
	d := newDir(t)
	if err := os.Chown(d.Path(), 12345, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := keystore.Open(d.Path()); !errors.Is(err, keystore.ErrUnsafe) || !strings.Contains(err.Error(), "uid 12345") {
		t.Errorf("foreign directory: %v", err)
	}
}

func TestReadBounds(t *testing.T) {
	d := newDir(t)
	mustWrite(t, d, "most", strings.Repeat("x", keystore.MaxFile))
	mustWrite(t, d, "more", strings.Repeat("x", keystore.MaxFile+1))
	if data, err := d.Read("most"); err != nil || len(data) != keystore.MaxFile {
		t.Errorf("1 MiB: %d bytes, %v", len(data), err)
	}
	if _, err := d.Read("more"); !errors.Is(err, keystore.ErrTooLarge) {
		t.Errorf("more than 1 MiB: %v", err)
	}
	if _, err := d.Read("none"); !errors.Is(err, keystore.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

// TestEveryFaultLeavesOldOrNew breaks each step of replacing a file in each way.
func TestEveryFaultLeavesOldOrNew(t *testing.T) {
	forEachFault(t, func(t *testing.T, d *keystore.Dir, broken func(func() error) error) {
		mustWrite(t, d, "file", "the old content")
		err := broken(func() error { return d.Write("file", []byte("the new content")) })
		got, rerr := d.Read("file")
		if rerr != nil {
			t.Fatal(rerr)
		}
		if s := string(got); s != "the old content" && s != "the new content" {
			t.Fatalf("torn file: %q after %v", s, err)
		}
		wantNoLeftovers(t, d.Path())
	})
}

func TestEveryFaultOfCreateNeverOverwrites(t *testing.T) {
	forEachFault(t, func(t *testing.T, d *keystore.Dir, broken func(func() error) error) {
		if err := d.Create("root", []byte("first")); err != nil {
			t.Fatal(err)
		}
		broken(func() error { return d.Create("root", []byte("second")) })
		wantContent(t, d, "root", "first")
		wantNoLeftovers(t, d.Path())
	})
}

// forEachFault runs f with each operation of the broken call broken in each way,
// until the call needs fewer operations than the one to be broken.
func forEachFault(t *testing.T, f func(t *testing.T, d *keystore.Dir, broken func(func() error) error)) {
	for _, fault := range []keystoretest.Fault{keystoretest.Lose, keystoretest.Refuse, keystoretest.Deny} {
		for step, hit := 0, "start"; hit != ""; step++ {
			t.Run(fmt.Sprintf("fault%d/step%d", fault, step), func(t *testing.T) {
				hit = ""
				base := -1
				fs := &keystoretest.FS{}
				fs.At = func(n int, op, _ string) keystoretest.Fault {
					if base < 0 || n != base+step {
						return keystoretest.Pass
					}
					hit = op
					return fault
				}
				d, err := keystore.MakeFS(filepath.Join(t.TempDir(), "state"), fs)
				if err != nil {
					t.Fatal(err)
				}
				f(t, d, func(call func() error) error {
					base = fs.Ops()
					err := call()
					// Cleaning up may fail without a word; nothing else may.
					if fault != keystoretest.Lose && hit != "" && hit != "remove" && err == nil {
						t.Errorf("failing %s went unreported", hit)
					}
					return err
				})
			})
		}
	}
}

// wantNoLeftovers takes the lock, which sweeps, and looks for temporary files.
func wantNoLeftovers(t *testing.T, path string) {
	t.Helper()
	d, err := keystore.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := d.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	entries, err := os.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".tmp-") {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

func TestCreateIsWonOnce(t *testing.T) {
	d := newDir(t)
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			err := d.Create("root", fmt.Appendf(nil, "writer %d", i))
			if err == nil {
				won.Add(1)
			} else if !errors.Is(err, keystore.ErrExist) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d writers won, want 1", won.Load())
	}
}

func TestLockExcludes(t *testing.T) {
	d := newDir(t)
	// The kernel's lock orders nothing in the eyes of the race detector, so count.
	var inside, through atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			unlock, err := d.Lock()
			if err != nil {
				t.Error(err)
				return
			}
			defer unlock()
			if n := inside.Add(1); n != 1 {
				t.Errorf("%d inside at once", n)
			}
			if has, err := d.Has("lock"); !has || err != nil {
				t.Errorf("no lock file: %v", err)
			}
			inside.Add(-1)
			through.Add(1)
		})
	}
	wg.Wait()
	if n := through.Load(); n != 8 {
		t.Errorf("%d went through", n)
	}
}

// TestDiskFull fills a tmpfs of 64 KiB that only this test's thread can see.
func TestDiskFull(t *testing.T) {
	nettest.RequireRoot(t)
	dir := t.TempDir()
	done := make(chan error)
	go func() {
		// Never unlocked: the thread dies with its mount namespace.
		runtime.LockOSThread()
		done <- fillDisk(dir)
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func fillDisk(dir string) error {
	if err := errors.Join(
		syscall.Unshare(syscall.CLONE_NEWNS|syscall.CLONE_FS),
		syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""),
		syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"),
	); err != nil {
		return err
	}
	d, err := keystore.Make(filepath.Join(dir, "state"))
	if err != nil {
		return err
	}
	if err := d.Write("key", []byte("the old content")); err != nil {
		return err
	}
	big := bytes.Repeat([]byte("x"), 128<<10)
	if err := d.Write("key", big); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("replace on a full disk: %v, want ENOSPC", err)
	}
	if err := d.Create("new", big); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("create on a full disk: %v, want ENOSPC", err)
	}
	got, err := d.Read("key")
	if err != nil || string(got) != "the old content" {
		return fmt.Errorf("after the failure: %q, %v", got, err)
	}
	entries, err := os.ReadDir(d.Path())
	if err != nil || len(entries) != 1 {
		return fmt.Errorf("left behind: %v, %v", entries, err)
	}
	// The space is free again.
	return d.Write("key", bytes.Repeat([]byte("y"), 32<<10))
}
