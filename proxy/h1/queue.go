package h1

// entry is one request whose response the client is still owed.
type entry struct {
	seq  uint32
	bits uint8
}

const (
	isHEAD    = 1 << iota
	isCONNECT // a 2xx answer makes the connection opaque
	isUpgrade // so does a 101
	isLocal   // the answer is ours and lies in queue.replies
	isLast    // nothing on the connection is answered after this
	isMinor0  // an HTTP/1.0 request
)

func (e entry) has(bits uint8) bool { return e.bits&bits != 0 }

// queue holds the outstanding requests, oldest first. The zero value is empty.
type queue struct {
	ring       [MaxOutstanding]entry
	head, tail uint32 // count up for ever; the ring's length is a power of two
	// replies belong to the local entries in order. They are copies: a local answer
	// waits only when a client pipelines, which is rare.
	replies [][]byte
}

func (q *queue) len() int    { return int(q.tail - q.head) }
func (q *queue) full() bool  { return q.len() == MaxOutstanding }
func (q *queue) empty() bool { return q.tail == q.head }

func (q *queue) at(i uint32) *entry { return &q.ring[i%MaxOutstanding] }
func (q *queue) front() *entry      { return q.at(q.head) }

// push adds a request and returns its number for [queue.holds].
func (q *queue) push(e entry) uint32 {
	*q.at(q.tail) = e
	q.tail++
	return q.tail - 1
}

func (q *queue) holds(number uint32) bool { return number-q.head < q.tail-q.head }

// pop removes the front entry, with its reply if it is a local one.
func (q *queue) pop() (e entry, reply []byte) {
	e = *q.front()
	q.head++
	if e.has(isLocal) {
		reply = q.replies[0]
		q.replies[0] = nil
		if q.replies = q.replies[1:]; len(q.replies) == 0 {
			q.replies = nil
		}
	}
	return e, reply
}

func (q *queue) clear() { q.head, q.replies = q.tail, nil }
