package svid

import (
	"cmp"
	"container/heap"
	"crypto/tls"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// entry is one ID and its SVID.
type entry struct {
	id spiffeid.ID

	// Read without a lock on every connection.
	current  atomic.Pointer[held] // nil until the first success
	lastUsed atomic.Int64         // Unix nanoseconds, exact to a second
	// asleep is set at half-life on an SVID that nobody wants: it is not renewed
	// but kept to its end, and the next use renews it. Set under Store.mu.
	asleep atomic.Bool

	// Guarded by Store.mu.
	mint     *mint     // the attempt under way; nil for none
	due      time.Time // wall clock: when to renew, or to try again
	index    int       // place in the queue, -1 when not in it
	failures int       // since the last success
	lastErr  error
	tried    int64 // Unix nanoseconds, when the last attempt ended
}

// held is one SVID, never changed.
type held struct {
	cert     *tls.Certificate
	notAfter time.Time
}

// mint is one attempt to make an SVID. err is set before done is closed.
type mint struct {
	done    chan struct{}
	err     error
	renewal bool // started by Run, and counted in Store.renewals
}

// use returns the current SVID and notes that it was wanted, nil when there is
// none that is valid.
func (e *entry) use(now time.Time) *tls.Certificate {
	h := e.current.Load()
	if h == nil || !now.Before(h.notAfter) {
		return nil
	}
	// Only a coarse order is wanted, and a shared cache line written by every
	// connection is not free.
	if t := now.UnixNano(); t-e.lastUsed.Load() > int64(coarse) {
		e.lastUsed.Store(t)
	}
	return h.cert
}

// coarse is how exact lastUsed is.
const coarse = time.Second

// unusedLocked reports that nobody has asked since the last attempt. In doubt it
// says no, since renewing in vain is cheap.
func (e *entry) unusedLocked() bool {
	return e.tried-e.lastUsed.Load() > int64(coarse)
}

// valid reports whether there is an SVID that has not expired.
func (e *entry) valid(now time.Time) bool {
	h := e.current.Load()
	return h != nil && now.Before(h.notAfter)
}

func (e *entry) statusLocked() Status {
	st := Status{ID: e.id, Failures: e.failures, RenewAt: e.due}
	if used := e.lastUsed.Load(); used != 0 {
		st.LastUsed = time.Unix(0, used)
	}
	if e.lastErr != nil {
		st.LastError = e.lastErr.Error()
	}
	if h := e.current.Load(); h != nil {
		leaf := h.cert.Leaf
		st.Serial, st.NotBefore, st.NotAfter = leaf.SerialNumber.Text(16), leaf.NotBefore, leaf.NotAfter
	}
	return st
}

func sortStatus(list []Status) {
	slices.SortFunc(list, func(a, b Status) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
}

// halfLife picks when to renew: between 45 and 55 hundredths of the life that is
// left, so that a thousand SVIDs made at once are not renewed at once. What is
// backdated does not count as life.
func halfLife(now, notAfter time.Time) time.Time {
	life := notAfter.Sub(now)
	return wall(now).Add(max(soonest, life*45/100+jitter(life/10)))
}

// soonest bounds how often one SVID is renewed: when the issuer's own end cuts
// lives short, halving what is left would never come to an end.
const soonest = time.Second

const (
	firstRetry = time.Second
	// lastRetry bounds the pause between attempts: an issuer that is back is
	// noticed within half a minute.
	lastRetry = 30 * time.Second
)

// retryAfter doubles the pause with every failure in a row, half of it random.
func retryAfter(failures int) time.Duration {
	pause := lastRetry
	if failures < 6 {
		pause = min(lastRetry, firstRetry<<max(failures-1, 0))
	}
	return pause/2 + jitter(pause/2)
}

// jitter is a random duration of at least 0 and less than d.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// wall strips the monotonic reading: certificates live by the wall clock, which
// also runs while the machine sleeps.
func wall(t time.Time) time.Time { return t.Round(0) }

// queue is a heap of entries by due time.
type queue []*entry

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }

func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push implements [heap.Interface].
func (q *queue) Push(x any) {
	e := x.(*entry)
	e.index = len(*q)
	*q = append(*q, e)
}

// Pop implements [heap.Interface].
func (q *queue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	e.index = -1
	return e
}

// set queues e for a time, wherever it stood before.
func (q *queue) set(e *entry, due time.Time) {
	e.due = due
	if e.index < 0 {
		heap.Push(q, e)
		return
	}
	heap.Fix(q, e.index)
}

func (q *queue) drop(e *entry) {
	if e.index >= 0 {
		heap.Remove(q, e.index)
	}
}
