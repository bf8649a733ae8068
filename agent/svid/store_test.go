package svid

import (
	"context"
	"crypto/x509"
	"errors"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
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

// TestRotationNeverLeavesAGap looks every second for a day.
func TestRotationNeverLeavesAGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		i.delay = 3 * time.Second // longer than between two looks
		renewed := 0
		var s *Store
		s = newStore(t, i, func(c *Config) {
			c.TTL = time.Hour
			c.OnRenew = func(id spiffeid.ID) {
				renewed++ // one ID, so calls follow one another
				if left := time.Until(mustGet(t, s, id).Leaf.NotAfter); left < 59*time.Minute {
					t.Errorf("OnRenew with %v left: the old SVID is still served", left)
				}
			}
		})
		stop := start(t, s)
		mustGet(t, s, web)
		calls := i.count(web)
		for range 24 * 60 * 60 {
			before := time.Now()
			cert := mustGet(t, s, web)
			if time.Now() != before {
				t.Fatal("a caller had to wait for a renewal")
			}
			if left := time.Until(cert.Leaf.NotAfter); left < 25*time.Minute {
				t.Fatalf("%v left", left)
			}
			time.Sleep(time.Second)
		}
		stop()
		calls = i.count(web) - calls
		if calls < 24*60/33 || calls > 24*60/27+1 || calls != renewed {
			t.Errorf("%d renewals in a day, %d reported", calls, renewed)
		}
	})
}

// The issuer is away for 20 minutes of every 70: nobody notices.
func TestOutagesBelowHalfALife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		s := newStore(t, i, nil)
		start(t, s)
		for minute := range 12 * 60 {
			down := minute%70 >= 50
			i.set(func(i *issuer) {
				if i.err = nil; down {
					i.err = errDown
				}
			})
			mustGet(t, s, web)
			time.Sleep(time.Minute)
		}
	})
}

func TestLastGoodIsKeptToItsEndAndNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		s := newStore(t, i, nil)
		start(t, s)
		cert := mustGet(t, s, web)
		i.set(func(i *issuer) { i.err = errDown })
		for time.Until(cert.Leaf.NotAfter) > 0 {
			if got := mustGet(t, s, web); got != cert {
				t.Fatal("another SVID from an issuer that is down")
			}
			time.Sleep(time.Second)
		}
		if got, err := s.Certificate(t.Context(), web); got != nil || !errors.Is(err, errDown) {
			t.Errorf("after the end: %v, %v", got, err)
		}
		st := s.Status()[0]
		if n := i.count(web); n < 30 || n > 200 || st.Failures != n-1 || st.LastError == "" {
			t.Errorf("asked %d times in half an hour, status %+v", n, st)
		}
		i.set(func(i *issuer) { i.err = nil })
		time.Sleep(lastRetry)
		synctest.Wait()
		if st := s.Status()[0]; st.Failures != 0 || st.LastError != "" {
			t.Errorf("half a minute after the issuer is back: %+v", st)
		}
		mustGet(t, s, web)
	})
}

// What nobody asks for is not renewed for ever, but is there while it lasts.
func TestUnusedIsLeftToExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		var dropped atomic.Int32
		s := newStore(t, i, func(c *Config) { c.OnRenew = func(spiffeid.ID) { dropped.Add(1) } })
		stop := start(t, s)
		mustGet(t, s, web)
		mustGet(t, s, idN(1))
		time.Sleep(5 * time.Minute)
		mustGet(t, s, web) // used after it was made
		time.Sleep(50 * time.Minute)
		if a, b := i.count(web), i.count(idN(1)); a != 2 {
			t.Errorf("used one made %d times, the other %d", a, b)
		}
		time.Sleep(6 * time.Hour)
		if len(s.Status()) != 0 || len(s.queue) != 0 {
			t.Errorf("still held: %v", s.Status())
		}
		if n := i.count(web) + i.count(idN(1)); n > 5 {
			t.Errorf("%d attempts for two that nobody wants", n)
		}
		stop()
		if n := dropped.Load(); n < 2 {
			t.Errorf("OnRenew was called %d times", n)
		}
	})
}

func TestSleepingOneIsRousedByUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		s := newStore(t, i, nil)
		start(t, s)
		mustGet(t, s, web)
		for !s.entries[web].asleep.Load() {
			time.Sleep(time.Minute)
		}
		old := mustGet(t, s, web) // at once, although it is past its half-life
		synctest.Wait()
		if fresh := mustGet(t, s, web); fresh == old {
			t.Error("use did not renew it")
		}
	})
}

func TestAThousandIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 1000
		i := newIssuer(t)
		s := newStore(t, i, nil)
		start(t, s)
		for k := range n {
			mustGet(t, s, idN(k))
		}
		i.set(func(i *issuer) { i.peak = 0 })
		for range 4 * 6 { // four hours
			time.Sleep(10 * time.Minute)
			for k := range n {
				mustGet(t, s, idN(k))
			}
		}
		synctest.Wait()
		total := 0
		for _, st := range s.Status() {
			total += i.count(st.ID)
			if left := time.Until(st.NotAfter); left < 26*time.Minute {
				t.Errorf("%s has %v left", st.ID, left)
			}
		}
		if got := len(s.Status()); got != n {
			t.Errorf("%d IDs held", got)
		}
		if total < 8*n || total > 10*n {
			t.Errorf("%d attempts for %d IDs in four hours", total, n)
		}
		if i.peak > atOnce {
			t.Errorf("%d renewals at once, want at most %d", i.peak, atOnce)
		}
	})
}

// The machine slept through everything: what expired is made anew, a few at a time.
func TestAllDueAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		s := newStore(t, i, nil)
		for k := range 100 {
			mustGet(t, s, idN(k))
		}
		time.Sleep(10 * time.Second)
		for k := range 100 {
			mustGet(t, s, idN(k)) // used since it was made
		}
		time.Sleep(50 * time.Minute) // nothing runs yet
		i.set(func(i *issuer) { i.delay, i.peak = 100*time.Millisecond, 0 })
		start(t, s)
		time.Sleep(100 * 100 * time.Millisecond / atOnce)
		synctest.Wait()
		for _, st := range s.Status() {
			if time.Until(st.NotAfter) < 50*time.Minute {
				t.Errorf("%s not renewed", st.ID)
			}
		}
		if i.peak != atOnce {
			t.Errorf("%d at once, want %d", i.peak, atOnce)
		}
	})
}

// When the issuer's own end cuts lives short, renewing does not turn into a storm.
func TestShortestLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		end := time.Now().Add(10 * time.Minute)
		i.edit = func(c *x509.Certificate) { c.NotAfter = end }
		s := newStore(t, i, nil)
		start(t, s)
		for time.Until(end) > 0 {
			mustGet(t, s, web)
			time.Sleep(time.Second)
		}
		if n := i.count(web); n > 30 {
			t.Errorf("asked %d times in ten minutes", n)
		}
		if _, err := s.Certificate(t.Context(), web); !errors.Is(err, ErrUnavailable) {
			t.Errorf("past the issuer's end: %v", err)
		}
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
