package keystore

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"
)

// FS is what a durable write needs of the file system. [OS] is the real one;
// tests wrap it to lose a write, or to store it and report a failure.
type FS interface {
	// Create makes a new file with mode 0600 and fails when the name is taken.
	Create(path string) (File, error)
	// Link gives a file a second name and fails when that name is taken.
	Link(from, to string) error
	// Rename replaces to by from.
	Rename(from, to string) error
	Remove(path string) error
	// SyncDir makes the directory's names durable.
	SyncDir(path string) error
}

// File is a file being written.
type File interface {
	io.WriteCloser
	Sync() error
}

// OS is the operating system's own [FS].
type OS struct{}

// Create implements [FS].
func (OS) Create(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Link implements [FS].
func (OS) Link(from, to string) error { return os.Link(from, to) }

// Rename implements [FS].
func (OS) Rename(from, to string) error { return os.Rename(from, to) }

// Remove implements [FS].
func (OS) Remove(path string) error { return os.Remove(path) }

// SyncDir implements [FS].
func (OS) SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// tempPrefix marks files being written. No name that is kept starts with it.
const tempPrefix = ".tmp-"

// Write replaces a file by data, or makes it. When it fails the old content is
// still there, or the new one already is; a caller that must know reads it back.
func (d *Dir) Write(name string, data []byte) error {
	temp, err := d.writeTemp(data)
	if err != nil {
		return fmt.Errorf("write %s: %w", d.Join(name), err)
	}
	if err := d.fs.Rename(temp, d.Join(name)); err != nil {
		d.fs.Remove(temp) // gone already if the rename did happen
		return fmt.Errorf("write %s: %w", d.Join(name), err)
	}
	return d.syncDir(name)
}

// Create makes a file and never replaces one: it returns [ErrExist] when the
// name is taken, also by another process in this very moment.
func (d *Dir) Create(name string, data []byte) error {
	temp, err := d.writeTemp(data)
	if err != nil {
		return fmt.Errorf("create %s: %w", d.Join(name), err)
	}
	// Unlike rename, link refuses a name that exists.
	err = d.fs.Link(temp, d.Join(name))
	d.fs.Remove(temp)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("create %s: %w", d.Join(name), ErrExist)
	}
	if err != nil {
		return fmt.Errorf("create %s: %w", d.Join(name), err)
	}
	return d.syncDir(name)
}

func (d *Dir) syncDir(name string) error {
	if err := d.fs.SyncDir(d.path); err != nil {
		return fmt.Errorf("write %s: make the directory entry durable: %w", d.Join(name), err)
	}
	return nil
}

// writeTemp stores data, durably, under a name that nobody reads.
func (d *Dir) writeTemp(data []byte) (path string, err error) {
	path = d.Join(tempPrefix + rand.Text())
	f, err := d.fs.Create(path)
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			d.fs.Remove(path)
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		// Without this the rename may reach the disk before the content does.
		err = f.Sync()
	}
	return path, errors.Join(err, f.Close())
}

// lockName is the file whose lock stands for the directory. It stays empty.
const lockName = "lock"

// lockWait bounds how long Lock waits. Holders sign a certificate and write
// three small files, which takes milliseconds on a sane disk.
const lockWait = 20 * time.Second

// Lock makes the caller the only writer of the directory, among processes and
// goroutines alike, until it calls unlock. It waits at most 20 s. What an
// interrupted writer left half-written is removed.
func (d *Dir) Lock() (unlock func(), err error) {
	path := d.Join(lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	if err := waitLock(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	d.sweep()
	return func() { f.Close() }, nil // the lock goes with its descriptor
}

func waitLock(f *os.File) error {
	deadline := time.Now().Add(lockWait)
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, syscall.EINTR):
			continue
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return err
		case time.Now().After(deadline):
			return errors.New("another ringfence process has held it for 20 s; is one hung?")
		}
		// flock has no deadline of its own, and a blocked thread cannot be recalled.
		time.Sleep(5 * time.Millisecond)
	}
}

// sweep removes files that a writer left when it was killed: they may hold
// keys. Failing is harmless, since nothing reads them.
func (d *Dir) sweep() {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			d.fs.Remove(d.Join(e.Name()))
		}
	}
}
