package socket

import "sync"

// Class is the size class of a pooled buffer.
type Class uint8

const (
	// Small takes a whole ordinary request or one TLS record.
	Small Class = iota
	// Large is what bulk is read into: four TLS records, so that a body costs
	// one read per 64 KiB and still fits a core's second-level cache.
	Large
	classes
)

var classSize = [classes]int{16 << 10, 64 << 10}

// Size is the number of octets in a buffer of the class.
func (c Class) Size() int { return classSize[c] }

var pools = [classes]sync.Pool{
	{New: func() any { return &Buffer{mem: make([]byte, classSize[Small]), class: Small} }},
	{New: func() any { return &Buffer{mem: make([]byte, classSize[Large]), class: Large} }},
}

// Buffer is a borrowed piece of memory. Whoever holds it either keeps it or
// calls Free once, and touches neither it nor slices of it afterwards.
type Buffer struct {
	// Bytes is the part in use, at the start of the memory.
	Bytes []byte

	mem   []byte
	class Class
}

// Borrow takes an empty buffer of the class from the pool.
func Borrow(class Class) *Buffer {
	b := pools[class].Get().(*Buffer)
	b.Bytes = b.mem[:0]
	return b
}

// Room is the unused part behind Bytes.
func (b *Buffer) Room() []byte { return b.mem[len(b.Bytes):] }

// Grow makes the next n octets of Room part of Bytes.
func (b *Buffer) Grow(n int) { b.Bytes = b.mem[:len(b.Bytes)+n] }

// Free gives the buffer back. It does nothing on nil.
func (b *Buffer) Free() {
	if b == nil {
		return
	}
	b.Bytes = nil
	pools[b.class].Put(b)
}
