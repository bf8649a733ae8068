package h1

// Conn is one connection's filter. The caller serialises its steps, and the
// writing of what they give, with one lock.
type Conn struct {
	cfg     *Config
	handler Handler

	// outstanding joins the halves: Downstream adds requests, Upstream answers them.
	outstanding queue
	down        downstream
	up          upstream

	http   bool      // the first line was a request's; of no meaning where HTTP is no guess
	opaque bool      // all bytes pass
	lax    bool      // because nothing is refused
	pardon bool      // the handler has said Pass
	ended  bool      // Close was given; what still comes is thrown away
	cut    *CutError // likewise, without a goodbye
}

// half is what both directions keep.
type half struct {
	scan    scanner
	body    body
	waiting bool // the last step left octets
	held    bool // and they wait for the other half
	eof     bool // the end of the stream was passed on
}

// downstream is the state of what the client sends.
type downstream struct {
	half
	seq     uint32 // requests so far
	number  uint32 // the current request's, in the queue; meaningless when it is skipped
	strip   *Names // of the current request's verdict
	skipped int64  // octets of a refused request's body thrown away
	lineOK  bool   // the request line being scanned is valid
	skip    bool   // the current request was refused and its body is thrown away
	gated   bool   // CONNECT or an upgrade awaits its answer: what follows may not be HTTP
	last    bool   // no request follows the current one
	dead    bool   // what still comes is thrown away

	line  firstLine
	sent  []byte // octets of the current head that have passed, if there are not too many
	ahead int    // how many have

	prologue prologue
	left     int // octets of it
}

// upstream is the state of what the server sends.
type upstream struct {
	half
	begun  bool // part of the front request's final response has left
	closes bool // this response is the server's last
	free   bool // it is not HTTP, and passes unread
}

// New makes the filter of one connection. cfg and h must not be nil.
func New(cfg *Config, h Handler) *Conn { return &Conn{cfg: cfg, handler: h} }

// Configure makes cfg hold from the next step on, for a connection whose mode
// changes while it lives: from Enforce to DryRun and from Observe to Passive, or
// back. What is opaque stays opaque; ask [Conn.Lax].
func (c *Conn) Configure(cfg *Config) { c.cfg, c.pardon = cfg, false }

// Opaque reports whether all bytes pass from now on.
func (c *Conn) Opaque() bool { return c.opaque }

// Lax reports whether all bytes pass only because the mode refuses nothing:
// Enforce in DryRun's place, or Observe in Passive's, would not let them.
func (c *Conn) Lax() bool { return c.lax }

// Outstanding is the number of requests whose responses are not complete.
func (c *Conn) Outstanding() int { return c.outstanding.len() }

// Idle reports whether the connection is between messages, so that closing it
// loses nothing. An opaque connection never is.
func (c *Conn) Idle() bool {
	return !c.opaque && !c.up.free && c.outstanding.empty() && c.down.idle() && c.up.idle()
}

func (h *half) idle() bool { return h.body.kind == noBody && !h.waiting }

// Downstream takes what the client sent. in begins with what the last Downstream step
// left; eof says that nothing follows it, and is said again with octets that were
// held. It returns how many octets it took. The
// only error is a *[CutError], which every later step returns again.
func (c *Conn) Downstream(in []byte, eof bool, out *Out) (n int, err error) {
	out.reset()
	s := step{in: in, eof: eof, out: out}
	c.down.waiting = false
	for c.clientBytes(&s) {
	}
	if eof && (s.pos < len(in) || c.http && c.down.ahead > 0) && !out.Hold {
		c.truncatedRequest(&s)
	}
	return c.finish(&s, &c.down.half, c.down.dead)
}

// Upstream takes what the server sent, in the same way.
func (c *Conn) Upstream(in []byte, eof bool, out *Out) (n int, err error) {
	out.reset()
	s := step{in: in, eof: eof, out: out}
	c.up.waiting = false
	for c.serverBytes(&s) {
	}
	if eof {
		c.serverEOF(&s)
	}
	return c.finish(&s, &c.up.half, false)
}

func (c *Conn) finish(s *step, h *half, mute bool) (n int, err error) {
	s.flush()
	left := len(s.in) - s.pos
	h.waiting, h.held = left > 0, s.out.Hold
	s.out.NeedMore = left > 0 && !s.out.Hold
	s.out.Opaque = c.opaque
	if s.eof && left == 0 && !h.eof {
		h.eof = true
		s.out.ForwardEOF = !c.ended && !mute
	}
	if c.cut != nil {
		return s.pos, c.cut
	}
	return s.pos, nil
}

// goOpaque lets everything pass from here on. That cannot be when answers of
// our own are still to come in between, and then it reports false.
func (c *Conn) goOpaque(out *Out) bool {
	if len(c.outstanding.replies) > 0 || c.down.skip && c.down.body.kind != noBody {
		return false
	}
	c.opaque = true
	c.outstanding.clear()
	out.Wake = c.down.waiting || c.up.waiting
	return true
}

// end closes the connection after what was given so far.
func (c *Conn) end(out *Out) {
	c.ended = true
	c.outstanding.clear()
	out.Close = true
}

// cutOff ends the connection without a goodbye.
func (c *Conn) cutOff(reason string) {
	c.ended = true
	c.outstanding.clear()
	c.cut = &CutError{reason}
}

// refused reports a refusal, and gives the reply to send where it is one.
func (c *Conn) refused(r Refusal) *Reply {
	if c.guessing() {
		return nil
	}
	reply := c.handler.Refused(r)
	switch {
	case reply == Pass:
		c.pardon = c.pardon || c.strict()
		return nil
	case reply != nil:
		return reply
	}
	return Deny(r.Status, "", r.Reason)
}
