package decisionlog

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"ringfence.dev/policy/authz"
)

// Config says where records go. A zero field means the default.
type Config struct {
	// Path is the file to append to; empty keeps records in memory only.
	Path string
	// MaxSize is the size in bytes at which the file is renamed aside. Zero means 64 MiB.
	MaxSize int64
	// Backups is how many renamed files are kept. Zero means 4, negative none.
	Backups int
	// Keep is how many records stay in memory. Zero means DefaultKeep, negative none.
	Keep int
}

const (
	// flushEvery and flushAt bound what a crash loses, and how often the disk is bothered.
	flushEvery = 200 * time.Millisecond
	flushAt    = 64 << 10
	// maxQueue bounds what waits for a disk that is slow or full: about 8,000
	// records, half a second at the busiest a node was measured.
	maxQueue = 4 << 20
	// retryEvery is how often a disk that failed is tried again.
	retryEvery = time.Second
)

// ErrNotRecorded reports that the queue to the file is full: the record is in
// memory only.
var ErrNotRecorded = errors.New("decision log: the queue is full")

// Log records decisions. Its methods are called from many goroutines. Records
// reach the file while Run runs; without a Path no Run is needed.
type Log struct {
	cfg  Config
	file file
	ring *ring // nil when none are kept
	wake chan struct{}

	// mu held means that the order of lines in queue is that of their numbers.
	mu      sync.Mutex
	queue   []byte // guarded by mu; whole lines not yet taken by Run
	lines   int    // guarded by mu; their number
	spare   []byte // guarded by mu; the other buffer, when Run is not writing it
	scratch []byte // guarded by mu
	status  Status // guarded by mu
}

// Status is what became of the records so far.
type Status struct {
	Path     string `json:"path,omitempty"`
	Recorded uint64 `json:"recorded"` // accepted, in memory at least
	Written  uint64 `json:"written"`  // in the file
	Dropped  uint64 `json:"dropped"`  // refused because the queue was full
	Queued   int    `json:"queued_bytes"`
	// Failures counts writes that failed; LastError is the last one's text, empty once writing works again.
	Failures  uint64 `json:"failures"`
	LastError string `json:"last_error,omitempty"`
}

// New returns a log. With a Path the file is opened at once, so that a wrong
// path is known at start.
func New(cfg Config) (*Log, error) {
	if cfg.MaxSize <= 0 {
		cfg.MaxSize = 64 << 20
	}
	switch {
	case cfg.Backups == 0:
		cfg.Backups = 4
	case cfg.Backups < 0:
		cfg.Backups = 0
	}
	if cfg.Keep == 0 {
		cfg.Keep = DefaultKeep
	}
	l := &Log{cfg: cfg, wake: make(chan struct{}, 1)}
	if cfg.Keep > 0 {
		l.ring = newRing(cfg.Keep)
	}
	l.status.Path = cfg.Path
	if cfg.Path == "" {
		return l, nil
	}
	l.file = file{path: cfg.Path, maxSize: cfg.MaxSize, backups: cfg.Backups}
	if err := l.file.open(); err != nil {
		return nil, err
	}
	return l, nil
}

// Record files r. It never blocks on the disk; it returns [ErrNotRecorded] when
// the record will not reach the file. In steady state it does not allocate.
func (l *Log) Record(r *Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.scratch = appendRecord(l.scratch[:0], r)
	l.status.Recorded++
	if l.ring != nil {
		l.ring.add(slot{id: r.ID, effect: r.Effect, unit: hash(r.Unit), scope: hash(r.Scope)}, l.scratch)
	}
	if l.cfg.Path == "" {
		return nil
	}
	if len(l.queue)+len(l.scratch) > maxQueue {
		l.status.Dropped++
		return ErrNotRecorded
	}
	before := len(l.queue)
	l.queue = append(l.queue, l.scratch...)
	l.lines++
	if before < flushAt && len(l.queue) >= flushAt {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
	return nil
}

// Run writes records to the file until ctx ends; then it writes what is left
// and closes the file. It returns an error only for that last step.
func (l *Log) Run(ctx context.Context) error {
	if l.cfg.Path == "" {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return errors.Join(l.flush(), l.file.close())
		case <-tick.C:
		case <-l.wake:
		}
		if l.flush() == nil {
			continue
		}
		// The disk is full or gone: knock again now and then, not for each record.
		select {
		case <-ctx.Done():
		case <-time.After(retryEvery):
		}
	}
}

// flush writes all that is queued. What fails to be written stays queued.
func (l *Log) flush() error {
	l.mu.Lock()
	lines, n := l.queue, l.lines
	l.queue, l.spare, l.lines = l.spare[:0], nil, 0
	l.mu.Unlock()
	if n == 0 {
		l.mu.Lock()
		l.spare = lines[:0]
		l.mu.Unlock()
		return nil
	}
	err := l.file.write(lines)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.status.Failures++
		l.status.LastError = err.Error()
		// The new lines follow the old ones; together they may exceed the bound by what came in meanwhile.
		l.queue, l.spare = append(lines, l.queue...), l.queue[:0]
		l.lines += n
		return err
	}
	l.status.LastError = ""
	l.status.Written += uint64(n)
	l.spare = lines[:0]
	if cap(lines) > 4*flushAt && len(lines) < cap(lines)/8 {
		l.spare = nil // a burst is over: give its memory back
	}
	return nil
}

// Status returns a copy of the counters.
func (l *Log) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.status
	s.Queued = len(l.queue)
	return s
}

// Find returns the records kept in memory under id, oldest first. An id without
// a request number returns the connection's records and those of all its requests.
func (l *Log) Find(id authz.ID) []Record {
	found := l.collect(func(s slot) bool {
		return s.id.Conn == id.Conn && (id.Seq == 0 || id.Seq == s.id.Seq)
	}, func(*Record) bool { return true }, l.cfg.Keep)
	slices.Reverse(found)
	return found
}

// Last returns at most n of the newest records that the filter chooses, newest first.
func (l *Log) Last(f Filter, n int) []Record {
	unit, scope := hash(f.Unit), hash(f.Scope)
	return l.collect(func(s slot) bool {
		return (f.Unit == "" || unit == s.unit) && (f.Scope == "" || scope == s.scope) &&
			(!f.Refused || s.effect != authz.Permit) &&
			(f.Effect == nil || s.effect == *f.Effect)
	}, func(r *Record) bool {
		return (f.Unit == "" || f.Unit == r.Unit) && (f.Scope == "" || f.Scope == r.Scope)
	}, n)
}

// collect parses outside of the ring's lock, which every decision takes.
func (l *Log) collect(want func(slot) bool, accept func(*Record) bool, n int) []Record {
	if l.ring == nil {
		return nil
	}
	var found []Record
	for _, text := range l.ring.newest(want, n) {
		if r, err := ParseRecord(text); err == nil && accept(&r) {
			found = append(found, r)
		}
	}
	return found
}
