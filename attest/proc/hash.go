package proc

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/workload"
)

// MaxHashSize is the largest executable that is hashed. A bigger one has no
// sha256 selector: at about 1 GiB/s its caller would wait longer than a
// connection may take to be named.
const MaxHashSize = 512 << 20

// settled is how old a file's last change must be before its hash is kept.
// Timestamps advance with the kernel's clock tick (or by 2 s on some file
// systems), so a file may change again without its times telling.
const settled = 3 * time.Second

// ErrTooLarge reports an executable above MaxHashSize.
var ErrTooLarge = errors.New("proc: executable is too large to hash")

// Hasher computes digests of executables and remembers them by device, inode,
// size, mtime and ctime. It is safe for concurrent use.
type Hasher struct {
	// turns bounds how many files are read at once, so that a crowd of large
	// executables cannot take the node's CPU.
	turns chan struct{}

	// mu held means sums is stable.
	mu   sync.Mutex
	sums map[FileID]string // at most keep entries
	keep int
}

// NewHasher returns a Hasher that remembers keep digests.
func NewHasher(keep int) *Hasher {
	return &Hasher{turns: make(chan struct{}, 2), sums: make(map[FileID]string), keep: max(keep, 1)}
}

// Sum returns the SHA-256 of the process's executable in lower-case
// hexadecimal. A file that changes while it is read is [workload.ErrGone].
func (s *Hasher) Sum(ctx context.Context, h *Handle) (string, error) {
	f, err := h.OpenExe()
	if err != nil {
		return "", err
	}
	defer f.Close()
	id, err := stat(f)
	if err != nil {
		return "", err
	}
	if id.Size > MaxHashSize {
		return "", fmt.Errorf("%w: %d bytes", ErrTooLarge, id.Size)
	}
	if sum, ok := s.known(id); ok {
		return sum, nil
	}
	select {
	case s.turns <- struct{}{}:
		defer func() { <-s.turns }()
	case <-ctx.Done():
		return "", fmt.Errorf("hash executable: %w", ctx.Err())
	}
	if sum, ok := s.known(id); ok { // somebody else read it while we waited
		return sum, nil
	}
	return s.compute(ctx, f, id)
}

func (s *Hasher) compute(ctx context.Context, f *os.File, id FileID) (string, error) {
	digest := sha256.New()
	if _, err := io.Copy(digest, &cancellable{ctx, io.LimitReader(f, MaxHashSize+1)}); err != nil {
		return "", fmt.Errorf("hash executable: %w", err)
	}
	after, err := stat(f)
	if err != nil {
		return "", err
	}
	if after != id {
		return "", fmt.Errorf("hash executable: it changed meanwhile: %w", workload.ErrGone)
	}
	sum := hex.EncodeToString(digest.Sum(nil))
	if time.Since(time.Unix(0, id.CTime)) > settled {
		s.remember(id, sum)
	}
	return sum, nil
}

func (s *Hasher) known(id FileID) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum, ok := s.sums[id]
	return sum, ok
}

func (s *Hasher) remember(id FileID, sum string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for old := range s.sums { // any one: a host runs far fewer programs than keep
		if len(s.sums) < s.keep {
			break
		}
		delete(s.sums, old)
	}
	s.sums[id] = sum
}

func stat(f *os.File) (FileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return FileID{}, fmt.Errorf("hash executable: %w", err)
	}
	return fileID(&st), nil
}

// cancellable ends a copy when its context does.
type cancellable struct {
	ctx context.Context
	r   io.Reader
}

func (c *cancellable) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
