package ca

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"ringfence.dev/ca/keystore/keystoretest"
)

func TestRunRenewsTheIntermediate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepTo2030()
		short := Options{IntermediateTTL: 3 * time.Hour}
		dir := newCADir(t, short)
		a := mustOpen(t, dir, short)
		other := mustOpen(t, dir, short) // another process on the directory
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.Run(ctx) }()
		seen := map[string]bool{}
		for range 12 {
			s := a.Status()
			seen[s.Serial] = true
			if left := time.Until(s.NotAfter); left < 55*time.Minute {
				t.Errorf("%v left on the intermediate", left)
			}
			chain := mustIssue(t, a, "spiffe://lab.test/a", 0)
			if _, _, err := x509svid.Verify(chain, other); err != nil {
				t.Errorf("the other process refuses: %v", err)
			}
			time.Sleep(time.Hour)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(seen) < 4 {
			t.Errorf("%d intermediates in twelve hours, want a new one every two", len(seen))
		}
		// The other finds the new one instead of making yet another.
		synctest.Wait()
		if err := other.Renew(); err != nil {
			t.Error(err)
		}
		if other.Status().Serial != a.Status().Serial {
			t.Error("two processes have two intermediates")
		}
	})
}

func TestIssueRenewsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepTo2030()
		a := mustOpen(t, newCADir(t, Options{}), Options{})
		old := a.Status().Serial
		time.Sleep(91 * 24 * time.Hour) // the machine was off for longer than the intermediate lived
		mustIssue(t, a, "spiffe://lab.test/a", 0)
		if a.Status().Serial == old {
			t.Error("the expired intermediate is still in use")
		}
	})
}

// A full disk, or an answer that was lost: signing goes on meanwhile.
func TestRenewSurvivesEveryFault(t *testing.T) {
	for _, fault := range []keystoretest.Fault{keystoretest.Lose, keystoretest.Refuse, keystoretest.Deny} {
		for step, reached := 0, true; reached; step++ {
			synctest.Test(t, func(t *testing.T) {
				sleepTo2030()
				reached = false
				dir := newCADir(t, Options{})
				fs := &keystoretest.FS{At: func(n int, _, _ string) keystoretest.Fault {
					if n != step {
						return keystoretest.Pass
					}
					reached = true
					return fault
				}}
				a := mustOpen(t, dir, Options{fs: fs})
				time.Sleep(70 * 24 * time.Hour)
				mustIssue(t, a, "spiffe://lab.test/a", 0)
				time.Sleep(2 * time.Minute)
				chain := mustIssue(t, a, "spiffe://lab.test/a", 0)
				if left := time.Until(chain[1].NotAfter); left < 80*24*time.Hour {
					t.Errorf("fault %d at step %d: still not renewed, %v left", fault, step, left)
				}
				mustIssue(t, mustOpen(t, dir, Options{}), "spiffe://lab.test/a", 0)
			})
		}
	}
}

func TestRenewFailuresAreHeldOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepTo2030()
		fs := &keystoretest.FS{At: func(int, string, string) keystoretest.Fault { return keystoretest.Refuse }}
		a := mustOpen(t, newCADir(t, Options{}), Options{fs: fs})
		time.Sleep(70 * 24 * time.Hour)
		for range 100 {
			mustIssue(t, a, "spiffe://lab.test/a", 0)
		}
		if n := fs.Ops(); n > 4 {
			t.Errorf("%d operations on a full disk for 100 SVIDs", n)
		}
	})
}

func TestReloadKeepsTheLastGoodState(t *testing.T) {
	dir := newCADir(t, Options{})
	a := mustOpen(t, dir, Options{})
	path := filepath.Join(dir, bundleFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.Reload(); !errors.Is(err, ErrState) {
		t.Errorf("Reload = %v, want ErrState", err)
	}
	mustIssue(t, a, "spiffe://lab.test/a", 0)
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.Reload(); err != nil {
		t.Error(err)
	}
	// A directory that changed hands is not followed.
	state := filepath.Join(dir, stateFile)
	if err := os.WriteFile(state, []byte(`{"version":1,"trust_domain":"other.test"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.Reload(); err == nil || a.TrustDomain() != lab {
		t.Errorf("Reload of another trust domain = %v", err)
	}
}

func TestRootNearItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sleepTo2030()
		dir := newCADir(t, Options{})
		time.Sleep(RootTTL - 10*24*time.Hour)
		a := mustOpen(t, dir, Options{})
		mustIssue(t, a, "spiffe://lab.test/a", 0)
		serial := a.Status().Serial
		time.Sleep(9 * 24 * time.Hour)
		mustIssue(t, a, "spiffe://lab.test/a", 0)
		if a.Status().Serial != serial {
			t.Error("renewed although the root has no more time to lend")
		}
		if err := a.Renew(); err != nil { // held off
			t.Error(err)
		}
		time.Sleep(2 * time.Minute)
		if err := a.Renew(); !errors.Is(err, ErrExpired) {
			t.Errorf("Renew = %v, want ErrExpired", err)
		}
		time.Sleep(2 * 24 * time.Hour)
		if _, err := a.Issue(t.Context(), spiffeid.RequireFromPath(lab, "/a"), newKey(t).Public(), 0); !errors.Is(err, ErrExpired) {
			t.Errorf("Issue after the root's end = %v, want ErrExpired", err)
		}
	})
}

// Many callers find the renewal due at the same moment: one renews, the others
// sign with what there is, and nobody waits.
func TestOneRenewalForAll(t *testing.T) {
	var made atomic.Int32
	opts := Options{Record: func(i Issuance) error {
		if i.Kind == "intermediate" {
			made.Add(1)
		}
		return nil
	}}
	synctest.Test(t, func(t *testing.T) {
		sleepTo2030()
		a := mustOpen(t, newCADir(t, opts), opts)
		made.Store(0)
		time.Sleep(70 * 24 * time.Hour)
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { mustIssue(t, a, "spiffe://lab.test/a", 0) })
		}
		wg.Wait()
	})
	if n := made.Load(); n != 1 {
		t.Errorf("%d intermediates were made", n)
	}
}
