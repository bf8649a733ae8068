// Package keystore keeps private keys, certificates and small state files in
// one directory: 0700 the directory, 0600 the files, owned by the user the
// process runs as, replaced in one step.
//
// It is not for keys of workloads, which never reach a disk.
//
// The invariant: a reader sees the old content of a file or the new one, never
// a part, also after a power cut; and a key that others could have read is
// refused rather than used.
package keystore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// MaxFile bounds what is read from one file, in octets. The largest file is a
// trust bundle, and 1 MiB holds more than a thousand roots.
const MaxFile = 1 << 20

var (
	// ErrUnsafe reports a file or directory that others may read or replace.
	ErrUnsafe = errors.New("keystore: not private")
	// ErrExist reports that Create found the name taken.
	ErrExist = errors.New("keystore: already exists")
	// ErrNotExist reports a missing file or directory; it matches [os.ErrNotExist] too.
	ErrNotExist = fmt.Errorf("keystore: %w", os.ErrNotExist)
	// ErrTooLarge reports a file above [MaxFile].
	ErrTooLarge = errors.New("keystore: file is too large")
)

// Dir is one open state directory. Its methods may be called from many
// goroutines; writers of several files that belong together hold [Dir.Lock].
type Dir struct {
	path string
	fs   FS
}

// Open opens an existing directory. It returns [ErrNotExist] when there is
// none, and [ErrUnsafe] when it is not the caller's own or not closed to others.
func Open(path string) (*Dir, error) { return OpenFS(path, OS{}) }

// OpenFS is [Open] with the writes going through fs.
func OpenFS(path string, fs FS) (*Dir, error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open %s: %w", path, ErrNotExist)
	}
	if err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("open %s: not a directory", path)
	}
	if err := checkPrivate(path, info, "0700"); err != nil {
		return nil, err
	}
	return &Dir{path: path, fs: fs}, nil
}

// Make opens the directory, making it (0700) and its parents (0755) when
// missing. A directory that exists is held to the same rules as by [Open].
func Make(path string) (*Dir, error) { return MakeFS(path, OS{}) }

// MakeFS is [Make] with the writes going through fs.
func MakeFS(path string, fs FS) (*Dir, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	// Two processes may race here; the loser finds the winner's directory.
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	return OpenFS(path, fs)
}

// Path returns the directory's path as it was given.
func (d *Dir) Path() string { return d.path }

// Join returns the path of a file in the directory.
func (d *Dir) Join(name string) string { return filepath.Join(d.path, name) }

// Has reports whether the directory holds name, whatever its kind.
func (d *Dir) Has(name string) (bool, error) {
	_, err := os.Lstat(d.Join(name))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for %s: %w", d.Join(name), err)
	}
	return true, nil
}

// Read returns the content of a file in the directory. It returns
// [ErrNotExist] when there is none, [ErrUnsafe] when the file is a link, is not
// the caller's own, or is open to others, and [ErrTooLarge] above [MaxFile].
func (d *Dir) Read(name string) ([]byte, error) {
	path := d.Join(name)
	f, err := openPrivate(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(data) > MaxFile {
		return nil, fmt.Errorf("read %s: %w: more than %d bytes", path, ErrTooLarge, MaxFile)
	}
	return data, nil
}

// openPrivate opens a file and then looks at what it has opened, so that the
// checks cannot be about another file than the one that is read.
func openPrivate(path string) (*os.File, error) {
	// O_NONBLOCK, or a FIFO put in our place would hang us here.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("open %s: %w", path, ErrNotExist)
	case errors.Is(err, syscall.ELOOP):
		return nil, fmt.Errorf("%w: %s is a symbolic link; put the file itself there", ErrUnsafe, path)
	case err != nil:
		return nil, fmt.Errorf("read key store: %w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s is not a regular file", ErrUnsafe, path)
	}
	if err == nil {
		err = checkPrivate(path, info, "0600")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// checkPrivate refuses what another user owns, could read or could replace,
// and tells the operator the command that mends it.
func checkPrivate(path string, info os.FileInfo, want string) error {
	uid := uint32(os.Geteuid())
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != uid {
		return fmt.Errorf("%w: %s belongs to uid %d, not to uid %d which this process runs as; if you trust its content: chown %d %s",
			ErrUnsafe, path, st.Uid, uid, uid, quote(path))
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%w: %s has mode %04o, so other users could read or change it; run: chmod %s %s (and replace its keys if someone else may have read them)",
			ErrUnsafe, path, perm, want, quote(path))
	}
	return nil
}

// quote makes a path safe to paste into a shell.
func quote(path string) string {
	plain := strings.IndexFunc(path, func(r rune) bool {
		return !strings.ContainsRune("/._-+:@%", r) && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) < 0
	if plain && path != "" {
		return path
	}
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}
