package policy

import (
	"hash/maphash"
	"strings"

	"ringfence.dev/policy/authz"
)

// cacheSlots is how many decided requests a snapshot remembers, for all
// connections together. With maxCachedTarget an entry stays below 1 KiB, so that
// the cache stays below 1 MiB whatever peers ask for.
const (
	cacheSlots      = 1024
	maxCachedTarget = 512
)

// cached is a decided request. Nothing else goes into a decision than the pair
// and these, so that equality of all is enough to answer again.
type cached struct {
	pair    *pair
	request authz.Request
	verdict verdict
}

// cacheSeed is drawn per process, so that nobody can aim at one slot.
var cacheSeed = maphash.MakeSeed()

func slotOf(p *pair, r *authz.Request) uint64 {
	var h maphash.Hash
	h.SetSeed(cacheSeed)
	_, _ = h.WriteString(r.Method)
	_, _ = h.WriteString(r.Target)
	_ = h.WriteByte(0)
	_, _ = h.WriteString(r.Host)
	return (h.Sum64() ^ p.hash) % cacheSlots
}

// request decides a request, from the cache if the same was asked before. The
// verdict is shared and must not be changed.
func (p *pair) request(r *authz.Request, separators bool) *verdict {
	slot := &p.snap.cache[slotOf(p, r)]
	if c := slot.Load(); c != nil && c.pair == p && c.request == *r {
		return &c.verdict
	}
	// The strings are the caller's, in buffers that it uses again.
	c := &cached{pair: p, request: authz.Request{
		Method: strings.Clone(r.Method), Target: strings.Clone(r.Target),
		Host: strings.Clone(r.Host), Upgrade: strings.Clone(r.Upgrade),
	}}
	c.verdict = p.evaluate(&c.request, separators)
	if len(r.Target)+len(r.Host)+len(r.Method)+len(r.Upgrade) <= maxCachedTarget {
		slot.Store(c)
	}
	return &c.verdict
}
