package svid

import (
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

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
