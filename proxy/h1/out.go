package h1

// Out is what one step gives. Its spans point into the step's input, or into
// memory of the Out itself, and are valid until its next step or the input is
// overwritten. It may be pooled between steps: an idle connection needs none. The
// zero value is ready.
type Out struct {
	// Forward goes on in the input's direction.
	Forward [][]byte
	// Reply goes back to the client; only Downstream steps give any.
	Reply [][]byte
	// ForwardEOF asks to half-close in the input's direction after Forward.
	ForwardEOF bool
	// Close asks to end the connection after Forward and Reply: send FIN to the
	// client and read on for a while (RFC 9112 section 9.6; unread bytes would
	// turn into a reset that takes the reply with it), and drop the server's side.
	Close bool
	// Opaque says that from now on all bytes pass in both directions: the steps
	// need not be called any more once held bytes are gone.
	Opaque bool
	// NeedMore says that the bytes not taken are incomplete.
	NeedMore bool
	// Hold says that the bytes not taken wait for the other half.
	Hold bool
	// Wake says that the other half can go on with bytes it did not take.
	Wake bool

	buf   []byte // memory of spans that are not in the input
	lines []line // the head being parsed
	head  Head   // likewise, of a request
}

// reset empties o, keeping its memory. The head is overwritten by the next one.
func (o *Out) reset() {
	clear(o.Forward) // a pooled Out must not keep the caller's buffers alive
	clear(o.Reply)
	o.Forward, o.Reply, o.buf = o.Forward[:0], o.Reply[:0], o.buf[:0]
	o.ForwardEOF, o.Close, o.Opaque = false, false, false
	o.NeedMore, o.Hold, o.Wake = false, false, false
}

// copied returns a copy of b in o's memory. Growing leaves earlier copies where they are.
func (o *Out) copied(b []byte) []byte {
	from := len(o.buf)
	o.buf = append(o.buf, b...)
	return o.buf[from:len(o.buf):len(o.buf)]
}

// step walks through one input. in[start:pos] was looked at and is to be
// forwarded, but is not yet a span: neighbours become one.
type step struct {
	in         []byte
	start, pos int
	eof        bool
	out        *Out
}

func (s *step) rest() []byte { return s.in[s.pos:] }

func (s *step) flush() {
	if s.pos > s.start {
		s.out.Forward = append(s.out.Forward, s.in[s.start:s.pos:s.pos])
	}
	s.start = s.pos
}

// drop takes n bytes without forwarding them.
func (s *step) drop(n int) {
	s.flush()
	s.pos += n
	s.start = s.pos
}

// insert puts b between what is forwarded so far and what follows.
func (s *step) insert(b []byte) {
	s.flush()
	s.out.Forward = append(s.out.Forward, b)
}
