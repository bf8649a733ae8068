package decisionlog

import (
	"bytes"
	"hash/maphash"
	"sync"

	"ringfence.dev/policy/authz"
)

// Filter chooses records; an empty field chooses all.
type Filter struct {
	Unit   string
	Scope  string
	Effect *authz.Effect
	// Refused leaves permits out.
	Refused bool
}

// DefaultKeep is how many records are kept in memory unless set otherwise.
const DefaultKeep = 10_000

// ringChunk is the unit in which records' memory is taken and used again. A
// record takes about 500 bytes and at most a few KiB, so a chunk holds a hundred.
const ringChunk = 64 << 10

// ring keeps the newest records as encoded lines. It takes memory as it fills and
// then none: a chunk whose records are all gone is used again.
type ring struct {
	mu      sync.Mutex
	keep    int
	slots   []slot // guarded by mu; circular once full
	next    int    // guarded by mu; where the next record goes
	chunks  [][]byte
	oldest  uint64 // guarded by mu; number of chunks[0]
	current uint64 // guarded by mu; number of the chunk being filled
}

// slot is one record: where its line is, and what is often asked for.
type slot struct {
	chunk  uint64
	off, n int32
	id     authz.ID
	effect authz.Effect
	unit   uint64 // hashes of the texts that filters ask for
	scope  uint64
}

var hashSeed = maphash.MakeSeed()

func hash(s string) uint64 { return maphash.String(hashSeed, s) }

func newRing(keep int) *ring {
	return &ring{keep: keep, chunks: [][]byte{nil}}
}

// maxChunks bounds the memory: what is kept is the number of records asked for,
// or 1 KiB for each of them, whichever is reached first.
func (r *ring) maxChunks() int { return max(2, r.keep*1024/ringChunk) }

func (r *ring) add(s slot, text []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := len(r.chunks) - 1
	if r.chunks[last] == nil {
		r.chunks[last] = make([]byte, 0, ringChunk)
	}
	if cap(r.chunks[last])-len(r.chunks[last]) < len(text) {
		r.turn(len(text))
		last = len(r.chunks) - 1
	}
	c := r.chunks[last]
	s.chunk, s.off, s.n = r.current, int32(len(c)), int32(len(text))
	r.chunks[last] = append(c, text...)
	if len(r.slots) < r.keep {
		r.slots = append(r.slots, s)
		return
	}
	r.slots[r.next] = s
	r.next = (r.next + 1) % r.keep
}

// turn begins a new chunk of at least size bytes, taking the oldest again at the bound.
func (r *ring) turn(size int) {
	var fresh []byte
	if len(r.chunks) >= r.maxChunks() {
		fresh = r.chunks[0][:0]
		copy(r.chunks, r.chunks[1:])
		r.chunks = r.chunks[:len(r.chunks)-1]
		r.oldest++
	}
	if cap(fresh) < size {
		fresh = make([]byte, 0, max(ringChunk, size))
	}
	r.chunks = append(r.chunks, fresh)
	r.current++
}

// newest returns copies of at most n of the kept lines that want chooses, newest first.
func (r *ring) newest(want func(slot) bool, n int) [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	var lines [][]byte
	for i := range len(r.slots) {
		s := r.slots[(r.next+len(r.slots)-1-i)%len(r.slots)]
		if s.chunk < r.oldest || len(lines) >= n {
			break // its memory has been used again, and so has that of all older ones
		}
		if want(s) {
			c := r.chunks[s.chunk-r.oldest]
			lines = append(lines, bytes.Clone(c[s.off:s.off+s.n]))
		}
	}
	return lines
}
