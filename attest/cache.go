package attest

import (
	"container/list"
	"sync"
)

// lru is a bounded map that forgets what was used longest ago. It is safe for
// concurrent use.
type lru[K comparable, V any] struct {
	// mu held means items and order agree.
	mu    sync.Mutex
	items map[K]*list.Element
	order *list.List // of pair[K, V], most recent first
	limit int
}

type pair[K comparable, V any] struct {
	key   K
	value V
}

func newLRU[K comparable, V any](limit int) *lru[K, V] {
	return &lru[K, V]{items: make(map[K]*list.Element), order: list.New(), limit: limit}
}

func (c *lru[K, V]) get(key K) (value V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.items[key]
	if !ok {
		return value, false
	}
	c.order.MoveToFront(el)
	return el.Value.(*pair[K, V]).value, true
}

// put stores a value and returns what fell out for it, if anything did: the
// value it replaced, or the oldest one.
func (c *lru[K, V]) put(key K, value V) (out V, dropped bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if el, ok := c.items[key]; ok {
		p := el.Value.(*pair[K, V])
		out, p.value = p.value, value
		c.order.MoveToFront(el)
		return out, true
	}
	c.items[key] = c.order.PushFront(&pair[K, V]{key, value})
	if len(c.items) <= c.limit {
		return out, false
	}
	last := c.order.Back()
	p := c.order.Remove(last).(*pair[K, V])
	delete(c.items, p.key)
	return p.value, true
}

// removeIf forgets the entries that drop says, and returns their values.
func (c *lru[K, V]) removeIf(drop func(K) bool) []V {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []V
	for key, el := range c.items {
		if drop(key) {
			out = append(out, el.Value.(*pair[K, V]).value)
			c.order.Remove(el)
			delete(c.items, key)
		}
	}
	return out
}

func (c *lru[K, V]) size() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.items)
}
