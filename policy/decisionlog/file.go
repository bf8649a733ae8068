package decisionlog

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// file is an append-only file of whole lines that is renamed aside when full. Used
// by one goroutine.
type file struct {
	path    string
	maxSize int64
	backups int

	f *os.File
	// broken is set when the file may end in half a line that could not be cut off.
	broken bool
}

// open opens or creates the file, mode 0600, and cuts off a line that an
// interrupted write left unfinished.
func (w *file) open() error {
	f, err := os.OpenFile(w.path, os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return fmt.Errorf("decision log: %w", err)
	}
	if err := w.adopt(f); err != nil {
		_ = f.Close()
		return fmt.Errorf("decision log: %w", err)
	}
	w.f, w.broken = f, false
	return nil
}

func (w *file) adopt(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New(w.path + " is not a regular file")
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := f.Chmod(0o600); err != nil {
			return err
		}
	}
	whole, err := wholeLines(f, info.Size())
	if err != nil || whole == info.Size() {
		return err
	}
	return f.Truncate(whole)
}

// wholeLines returns the offset after the last newline within the last MiB,
// which is more than the longest record.
func wholeLines(f *os.File, size int64) (int64, error) {
	buf := make([]byte, 4096)
	for end := size; end > 0 && size-end < 1<<20; {
		n := min(int64(len(buf)), end)
		if _, err := f.ReadAt(buf[:n], end-n); err != nil {
			return 0, err
		}
		for i := n - 1; i >= 0; i-- {
			if buf[i] == '\n' {
				return end - n + i + 1, nil
			}
		}
		end -= n
	}
	return 0, nil
}

// write appends lines, which end in a newline. After an error nothing of them
// is in the file, as far as that can be undone, so that they can be written again.
func (w *file) write(lines []byte) error {
	size, err := w.ready()
	if err != nil {
		return err
	}
	if size > 0 && size+int64(len(lines)) > w.maxSize {
		if err := w.rotate(); err != nil {
			return err
		}
		size = 0
	}
	if w.broken {
		if _, err := w.f.Write([]byte{'\n'}); err != nil {
			return fmt.Errorf("decision log: %w", err)
		}
		w.broken = false
		size++
	}
	n, err := w.f.Write(lines)
	if err == nil {
		return nil
	}
	w.undo(size, int64(n))
	return fmt.Errorf("decision log: %w", err)
}

// ready makes sure that the open file is the one at path, which somebody may
// have moved aside, and returns its size.
func (w *file) ready() (int64, error) {
	if w.f != nil {
		there, err := os.Stat(w.path)
		here, err2 := w.f.Stat()
		if err == nil && err2 == nil && os.SameFile(there, here) {
			return here.Size(), nil
		}
		_ = w.close() // what it held is written; the path is what counts
	}
	if err := w.open(); err != nil {
		return 0, err
	}
	info, err := w.f.Stat()
	if err != nil {
		return 0, fmt.Errorf("decision log: %w", err)
	}
	return info.Size(), nil
}

// undo cuts n bytes of a failed write off again. While two processes write, as
// during an upgrade, the end is not ours alone: then the half line is closed by the next write.
func (w *file) undo(size, n int64) {
	if n == 0 {
		return
	}
	info, err := w.f.Stat()
	if err != nil || info.Size() != size+n || w.f.Truncate(size) != nil {
		w.broken = true
	}
}

// rotate renames path to path.1, path.1 to path.2 and so on, and begins anew.
func (w *file) rotate() error {
	if err := w.close(); err != nil {
		return err
	}
	for i := w.backups; i >= 1; i-- {
		from := w.path
		if i > 1 {
			from += "." + strconv.Itoa(i-1)
		}
		if err := os.Rename(from, w.path+"."+strconv.Itoa(i)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("decision log: rotate: %w", err)
		}
	}
	if w.backups == 0 {
		if err := os.Remove(w.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("decision log: rotate: %w", err)
		}
	}
	return w.open()
}

func (w *file) close() error {
	if w.f == nil {
		return nil
	}
	err := w.f.Close()
	w.f = nil
	if err != nil {
		return fmt.Errorf("decision log: close: %w", err)
	}
	return nil
}
