package policy

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is how long a directory must have been quiet before it is read: a
	// save is several steps, and a set of policies several saves.
	settle = 250 * time.Millisecond
	// maxUnsettled bounds the wait when something never stops writing; what is
	// read then is checked like all else.
	maxUnsettled = 10 * time.Second
	// lookEvery is how often the directory is looked at without any event, for
	// file systems that send none and events that the kernel dropped.
	lookEvery = 30 * time.Second
)

// Follow reloads the policies whenever their directory changes, until ctx
// ends. Loads that fail are logged, counted and kept in Status; they do not end
// it. Without a directory it only waits.
func (e *Engine) Follow(ctx context.Context) error {
	if e.cfg.Dir == "" {
		<-ctx.Done()
		return nil
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("policy: watch %s: %w", e.cfg.Dir, err)
	}
	defer func() { _ = watcher.Close() }()
	f := &follower{engine: e, dir: filepath.Clean(e.cfg.Dir), watcher: watcher, seen: unseen}
	f.watch()
	return f.run(ctx)
}

// follower is the state of one Follow, owned by its goroutine.
type follower struct {
	engine  *Engine
	dir     string
	watcher *fsnotify.Watcher
	seen    string // fingerprint of what was last loaded, or refused
}

// unseen is no directory's fingerprint: the first look loads, because what
// changed between making the engine and watching has caused no event.
const unseen = "unseen"

// watch watches the directory, and its parent because the directory itself may
// be replaced. Adding again follows a replacement; errors are made good by looking.
func (f *follower) watch() {
	_ = f.watcher.Add(filepath.Dir(f.dir))
	_ = f.watcher.Add(f.dir)
}

func (f *follower) run(ctx context.Context) error {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	quiet := time.NewTimer(settle)
	defer quiet.Stop()
	var since time.Time // of the first change not yet loaded
	var last string     // fingerprint when last looked at
	for {
		select {
		case <-ctx.Done():
			return nil
		case event, ok := <-f.watcher.Events:
			if !ok {
				return fmt.Errorf("policy: watch %s: watcher closed", f.dir)
			}
			if f.concerns(event.Name) {
				quiet.Reset(settle)
			}
			continue
		case <-f.watcher.Errors: // an overflow: look at it all
		case <-look.C:
		case <-quiet.C:
		}
		f.watch()
		now := fingerprint(f.dir)
		switch {
		case now == f.seen:
			since = time.Time{}
		case now != last && (since.IsZero() || time.Since(since) < maxUnsettled):
			// Still changing, or just seen for the first time: look again before reading.
			if since.IsZero() {
				since = time.Now()
			}
			quiet.Reset(settle)
		default:
			_ = f.engine.Reload() // logged, counted and kept in Status
			// Taken before reading: what changed meanwhile differs from it at the next look.
			f.seen, since = now, time.Time{}
			quiet.Reset(settle)
		}
		last = now
	}
}

// concerns reports whether an event's path is the directory or in it.
func (f *follower) concerns(path string) bool {
	path = filepath.Clean(path)
	return path == f.dir || filepath.Dir(path) == f.dir
}

// fingerprint tells one state of a directory from another without reading its
// files. The loading of a file that changes under the reader is caught by the next look.
func fingerprint(dir string) string {
	var b strings.Builder
	names, err := listFiles(dir)
	if err != nil {
		return "error: " + err.Error()
	}
	for _, name := range names {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			fmt.Fprintf(&b, "%s %v\n", name, err)
			continue
		}
		fmt.Fprintf(&b, "%s %d %d %v\n", name, info.Size(), info.ModTime().UnixNano(), inode(info))
	}
	return b.String()
}

// inode identifies a file beyond its name, size and time.
func inode(info fs.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(st.Ino)
	}
	return 0
}
