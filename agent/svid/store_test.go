package svid

import (
	"context"
	"crypto/x509"
	"errors"
	"net/url"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca"
)

func TestConfigIsChecked(t *testing.T) {
	i := newIssuer(t)
	for name, c := range map[string]Config{
		"nothing":       {},
		"no bundles":    {Issuer: i},
		"no issuer":     {Bundles: bundleOf(lab)},
		"negative TTL":  {Issuer: i, Bundles: bundleOf(lab), TTL: -1},
		"negative size": {Issuer: i, Bundles: bundleOf(lab), MaxIDs: -1},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestCertificateIsComplete(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	if _, err := ca.Init(dir, lab, ca.Options{}); err != nil {
		t.Fatal(err)
	}
	authority, err := ca.Open(dir, ca.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Issuer: authority, Bundles: authority})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cert := mustGet(t, s, web)
	if len(cert.Certificate) != 2 || cert.Leaf == nil || cert.PrivateKey == nil {
		t.Errorf("chain of %d, leaf %v", len(cert.Certificate), cert.Leaf)
	}
	if again := mustGet(t, s, web); again != cert {
		t.Error("another pointer without a renewal")
	}
	if id, err := s.Verify(cert.Certificate); err != nil || id != web {
		t.Errorf("Verify = %v, %v", id, err)
	}
	if _, err := s.Certificate(t.Context(), spiffeid.RequireFromPath(other, "/a")); !errors.Is(err, ErrUnavailable) || !errors.Is(err, ca.ErrForeign) {
		t.Errorf("foreign ID: %v", err)
	}
}

func TestOneAttemptForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		i.delay = time.Second
		s := newStore(t, i, nil)
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { mustGet(t, s, web) })
		}
		wg.Wait()
		if n := i.count(web); n != 1 {
			t.Errorf("the issuer was asked %d times", n)
		}
	})
}

// Whoever asked first may give up; the SVID is made for the others.
func TestFirstCallerGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		i.delay = 2 * time.Second
		s := newStore(t, i, nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := s.Certificate(ctx, web); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("first caller: %v", err)
			}
		})
		synctest.Wait()
		wg.Go(func() { mustGet(t, s, web) })
		wg.Wait()
		if n := i.count(web); n != 1 {
			t.Errorf("the issuer was asked %d times", n)
		}
		if _, err := s.Certificate(ctx, idN(1)); !errors.Is(err, context.DeadlineExceeded) || i.count(idN(1)) != 0 {
			t.Errorf("ended context: %v, asked %d times", err, i.count(idN(1)))
		}
	})
}

func TestIssuerThatNeverAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		i.delay = time.Hour
		s := newStore(t, i, nil)
		begin := time.Now()
		if _, err := s.Certificate(t.Context(), web); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Certificate = %v", err)
		}
		if took := time.Since(begin); took != defaultIssueTimeout {
			t.Errorf("gave up after %v", took)
		}
	})
}

func TestFailureIsNotAskedAgainAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		i.err = errDown
		s := newStore(t, i, nil)
		for range 1000 {
			if _, err := s.Certificate(t.Context(), web); !errors.Is(err, errDown) || !errors.Is(err, ErrUnavailable) {
				t.Fatalf("Certificate = %v", err)
			}
		}
		if n := i.count(web); n != 1 {
			t.Errorf("the issuer was asked %d times in one moment", n)
		}
		i.set(func(i *issuer) { i.err = nil })
		time.Sleep(time.Second)
		mustGet(t, s, web)
	})
}

func TestBoundedByEviction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		var mu sync.Mutex
		var dropped []spiffeid.ID
		s := newStore(t, i, func(c *Config) {
			c.MaxIDs = 3
			c.OnRenew = func(id spiffeid.ID) {
				mu.Lock()
				defer mu.Unlock()
				dropped = append(dropped, id)
			}
		})
		for k := range 3 {
			mustGet(t, s, idN(k))
			time.Sleep(2 * time.Second)
		}
		mustGet(t, s, idN(0)) // so 1 is now the one wanted least recently
		mustGet(t, s, idN(3))
		if len(s.entries) != 3 || s.entries[idN(1)] != nil || len(dropped) != 1 || dropped[0] != idN(1) {
			t.Errorf("held %v, dropped %v", s.Status(), dropped)
		}
		// With all of them being made at this moment there is no room.
		i.set(func(i *issuer) { i.delay = time.Second })
		var wg sync.WaitGroup
		for k := range 3 {
			wg.Go(func() { mustGet(t, s, idN(10+k)) })
		}
		synctest.Wait()
		if _, err := s.Certificate(t.Context(), idN(20)); !errors.Is(err, ErrUnavailable) {
			t.Errorf("no room: %v", err)
		}
		wg.Wait()
		if len(s.entries) != 3 || len(s.queue) != 3 {
			t.Errorf("%d entries, %d queued", len(s.entries), len(s.queue))
		}
	})
}

func TestIssuerThatLies(t *testing.T) {
	strangerKey := newKey(t)
	cases := map[string]func(*x509.Certificate){
		"another ID": func(c *x509.Certificate) { c.URIs = []*url.URL{idN(9).URL()} },
		"two IDs":    func(c *x509.Certificate) { c.URIs = append(c.URIs, idN(9).URL()) },
		"a CA":       func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign },
		"expired":    func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) },
		"not begun":  func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) },
		"no server":  func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] },
	}
	for name, edit := range cases {
		i := newIssuer(t)
		i.edit = edit
		if cert, err := newStore(t, i, nil).Certificate(t.Context(), web); cert != nil || !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v, %v", name, cert, err)
		}
	}
	i := newIssuer(t)
	for name, f := range map[string]issuerFunc{
		"another key": func() ([]*x509.Certificate, error) {
			cert, err := i.ca.leaf(strangerKey.Public(), web, nil)
			return []*x509.Certificate{cert}, err
		},
		"nothing": func() ([]*x509.Certificate, error) { return nil, nil },
	} {
		s := newStore(t, i, func(c *Config) { c.Issuer = f })
		if cert, err := s.Certificate(t.Context(), web); cert != nil || !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v, %v", name, cert, err)
		}
	}
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		s := newStore(t, i, nil)
		stop := start(t, s)
		cert := mustGet(t, s, web)
		i.set(func(i *issuer) { i.delay = time.Hour })
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := s.Certificate(context.Background(), idN(1)); !errors.Is(err, ErrUnavailable) {
				t.Errorf("cut off by Close: %v", err)
			}
		})
		synctest.Wait()
		stop() // waits for the attempt under way, which it cancels
		wg.Wait()
		s.Close()
		if got := mustGet(t, s, web); got != cert {
			t.Error("a live SVID is gone after Close")
		}
		if _, err := s.Certificate(context.Background(), idN(2)); !errors.Is(err, ErrClosed) {
			t.Errorf("new SVID after Close: %v", err)
		}
		time.Sleep(2 * time.Hour)
		if _, err := s.Certificate(context.Background(), web); !errors.Is(err, ErrClosed) {
			t.Errorf("expired SVID after Close: %v", err)
		}
	})
}

func TestStatus(t *testing.T) {
	i := newIssuer(t)
	s := newStore(t, i, nil)
	mustGet(t, s, idN(2))
	cert := mustGet(t, s, idN(1))
	st := s.Status()
	if len(st) != 2 || st[0].ID != idN(1) || st[1].ID != idN(2) {
		t.Fatalf("Status = %+v", st)
	}
	if got := st[0]; !got.NotAfter.Equal(cert.Leaf.NotAfter) || got.Serial != cert.Leaf.SerialNumber.Text(16) ||
		got.LastUsed.IsZero() || time.Until(got.RenewAt) < 25*time.Minute || time.Until(got.RenewAt) > 34*time.Minute {
		t.Errorf("Status = %+v", got)
	}
}

// Real time, real parallelism: for the race detector.
func TestManyAtOnce(t *testing.T) {
	i := newIssuer(t)
	i.ttl = 3 * time.Second // certificates count whole seconds
	s := newStore(t, i, func(c *Config) { c.MaxIDs = 20; c.OnRenew = func(spiffeid.ID) {} })
	start(t, s)
	end := time.Now().Add(4 * time.Second)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for k := g; time.Now().Before(end); k++ {
				cert := mustGet(t, s, idN(k%30))
				if k%50 == 0 {
					s.Status()
					if id, err := s.Verify(cert.Certificate); err != nil || id != idN(k%30) {
						t.Errorf("Verify = %v, %v", id, err)
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestMemoryPerID states what one more workload costs: at most 16 KiB, so that a
// thousand stay below 16 MiB.
func TestMemoryPerID(t *testing.T) {
	const n = 1000
	i := newIssuer(t)
	s := newStore(t, i, nil)
	mustGet(t, s, web)
	before := heapAlloc(t)
	for k := range n {
		mustGet(t, s, idN(k))
	}
	i.set(func(i *issuer) { clear(i.calls) })
	per := (heapAlloc(t) - before) / n
	t.Logf("%d octets per ID", per)
	if per > 16<<10 {
		t.Errorf("%d octets per ID, want at most 16 KiB", per)
	}
	mustGet(t, s, web) // keeps the store alive until here
}

func heapAlloc(t *testing.T) int64 {
	t.Helper()
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
