package agent

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"ringfence.dev/test/nettest"
)

func TestLockIsOfOneHolder(t *testing.T) {
	nettest.RequireRoot(t)
	l, err := lockInstance("locktest")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockInstance("locktest"); !errors.Is(err, errRunning) {
		t.Errorf("a second lock: %v", err)
	}
	name := l.file.Name()
	if err := l.remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file stays: %v", err)
	}
}

// Removing the file under others who are about to lock it never gives two of them "the" lock.
func TestLockRemovedUnderOthers(t *testing.T) {
	nettest.RequireRoot(t)
	var holders, most atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 25 {
				l, err := lockInstance("lockrace")
				if errors.Is(err, errRunning) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if n := holders.Add(1); n > most.Load() {
					most.Store(n)
				}
				holders.Add(-1)
				if err := l.remove(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d held the lock at once", most.Load())
	}
}
