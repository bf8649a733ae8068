// Package keystoretest gives tests a file system whose writes go wrong on
// demand. It is not for use outside of tests.
package keystoretest

import (
	"errors"
	"sync"

	"ringfence.dev/ca/keystore"
)

// ErrInjected is what a refused or denied operation reports.
var ErrInjected = errors.New("injected failure")

// Fault is what happens to one operation.
type Fault int

const (
	Pass   Fault = iota
	Lose         // not done, reported as done: a power cut took it
	Refuse       // not done, and reported so: a full disk
	Deny         // done, reported as failed: the answer was lost
)

// FS does as the operating system does, but for operations that At picks.
type FS struct {
	keystore.OS
	// At picks what happens to the n-th operation (from 0) of this FS.
	At func(n int, op, path string) Fault

	mu sync.Mutex
	n  int
}

// Ops returns how many operations were asked for so far.
func (f *FS) Ops() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

func (f *FS) do(op, path string, real func() error) error {
	f.mu.Lock()
	fault := f.At(f.n, op, path)
	f.n++
	f.mu.Unlock()
	switch {
	case fault == Lose && op != "write": // what Sync has confirmed is not lost, so neither is a write before it
		return nil
	case fault == Refuse:
		return ErrInjected
	case fault == Deny:
		return errors.Join(ErrInjected, real())
	default:
		return real()
	}
}

// Create implements [keystore.FS]. A lost creation is refused: without a file
// there is nothing to write to.
func (f *FS) Create(path string) (keystore.File, error) {
	var file keystore.File
	err := f.do("create", path, func() (err error) {
		file, err = f.OS.Create(path)
		return err
	})
	if err == nil && file == nil {
		err = ErrInjected
	}
	if err != nil {
		if file != nil {
			file.Close()
		}
		return nil, err
	}
	return &faultyFile{File: file, fs: f, path: path}, nil
}

// Link implements [keystore.FS].
func (f *FS) Link(from, to string) error {
	return f.do("link", to, func() error { return f.OS.Link(from, to) })
}

// Rename implements [keystore.FS].
func (f *FS) Rename(from, to string) error {
	return f.do("rename", to, func() error { return f.OS.Rename(from, to) })
}

// Remove implements [keystore.FS].
func (f *FS) Remove(path string) error {
	return f.do("remove", path, func() error { return f.OS.Remove(path) })
}

// SyncDir implements [keystore.FS].
func (f *FS) SyncDir(path string) error {
	return f.do("syncdir", path, func() error { return f.OS.SyncDir(path) })
}

type faultyFile struct {
	keystore.File
	fs   *FS
	path string
}

// Write stores half of the data when it is refused, as a full disk does.
func (f *faultyFile) Write(p []byte) (int, error) {
	n := len(p)
	err := f.fs.do("write", f.path, func() (err error) {
		n, err = f.File.Write(p)
		return err
	})
	if err != nil {
		f.File.Write(p[:len(p)/2])
		return n / 2, err
	}
	return n, nil
}

func (f *faultyFile) Sync() error {
	return f.fs.do("sync", f.path, f.File.Sync)
}
