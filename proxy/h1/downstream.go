package h1

// clientBytes takes the next piece of what the client sent: a head, part of a
// body, or everything. It reports whether to go on.
func (c *Conn) clientBytes(s *step) (progress bool) {
	switch {
	case c.ended || c.down.dead:
		s.drop(len(s.rest()))
		return false
	case c.opaque:
		s.pos = len(s.in)
		return false
	case s.pos == len(s.in):
		return false
	case c.down.body.kind != noBody:
		return c.requestBody(s)
	}
	return c.requestHead(s)
}

func (c *Conn) requestHead(s *step) (progress bool) {
	d := &c.down
	d.skip = false
	if d.last {
		c.stray(s)
		return true
	}
	if c.outstanding.full() || d.gated && !c.outstanding.empty() {
		s.out.Hold = true
		return false
	}
	d.gated = false
	if c.guessing() {
		return c.guess(s)
	}
	raw := s.rest()
	n, f := c.scanRequest(raw)
	if f.bad() {
		d.seq++
		c.refuseHead(s, f)
		return true
	}
	if n == 0 {
		return false
	}
	d.scan, d.lineOK = scanner{}, false
	d.seq++
	c.decide(s, d.wholeHead(raw[:n]))
	d.sent, d.ahead = nil, 0
	return true
}

// scanRequest looks for the end of a head. What cannot be a request any more is
// found at its first wrong octet, not when a head's worth of it has come.
func (c *Conn) scanRequest(raw []byte) (n int, f fault) {
	d := &c.down
	seen := d.scan.seen
	n, f = d.scan.scan(raw, c.cfg.maxHead()-d.ahead, c.cfg.maxFields())
	switch {
	case f.bad() || d.lineOK || n > 0:
	case d.scan.lines > 0:
		d.lineOK = true
		var h Head
		f = h.parseLine(raw)
	case !couldBeLine(raw[seen:], seen == 0):
		f = malformed("not an HTTP request line")
	}
	return n, f
}

// decide parses a whole head and asks the handler. Nothing of the request has
// been forwarded before, unless its first line came late.
func (c *Conn) decide(s *step, raw []byte) {
	h := &s.out.head
	*h = Head{Seq: c.down.seq}
	if f := h.parse(raw, c.cfg, s.out); f.bad() {
		c.refuseHead(s, f)
		return
	}
	v := c.handler.Request(h)
	switch {
	case !v.Allow:
		c.answer(s, h, v.Reply)
	case v.Strip != nil && h.nominates(v.Strip):
		c.refuseHead(s, malformed("Connection nominates a protected header"))
	default:
		c.forward(s, h, &v)
	}
}

// forward sends an allowed request on its way: the request line, the lines to
// add, and what is not stripped of the rest, untouched.
func (c *Conn) forward(s *step, h *Head, v *Verdict) {
	base := s.pos - c.down.ahead // where the head would begin in the input
	s.pos = base + h.first
	if len(v.Add) > 0 {
		s.insert(s.out.copied(v.Add))
	}
	for i := range h.lines {
		l := &h.lines[i]
		name := h.raw[l.start:l.nameEnd]
		if l.struck() || c.cfg.Strip.Has(name) || v.Strip.Has(name) {
			from, to := l.bounds()
			s.pos = base + from
			s.drop(to - from)
		}
	}
	s.pos = base + len(h.raw)
	c.expectResponse(h, v.Strip)
}

func (c *Conn) expectResponse(h *Head, strip *Names) {
	d := &c.down
	e := entry{seq: h.Seq}
	if h.isHEAD {
		e.bits |= isHEAD
	}
	if h.connect {
		e.bits |= isCONNECT
	}
	if h.Upgrade != "" {
		e.bits |= isUpgrade
	}
	if h.Minor == 0 {
		e.bits |= isMinor0
	}
	d.number = c.outstanding.push(e)
	d.gated = e.has(isCONNECT | isUpgrade)
	d.last = h.wantsClose()
	d.strip = strip
	d.beginBody(h)
}

func (d *downstream) beginBody(h *Head) {
	switch {
	case h.ContentLength < 0:
		d.body.begin(chunkSize, 0)
	case h.ContentLength > 0:
		d.body.begin(counted, h.ContentLength)
	}
}

// answer replies to a request that is not allowed, and keeps the connection for
// the next one if this one's body can be skipped.
func (c *Conn) answer(s *step, h *Head, reply *Reply) {
	if reply == nil {
		reply = Deny(403, "", "")
	}
	d := &c.down
	// A client that waits for 100 and gets a final status may leave the body out
	// (RFC 9110 section 10.1.1): whether the next octets are body is anyone's guess.
	guess := h.fields.expect && h.hasBody()
	closing := reply.Close || h.wantsClose() || guess || h.ContentLength > c.cfg.maxSkip()
	closing = closing || d.ahead > 0 // the server has the beginning of it
	s.drop(len(h.raw) - d.ahead)
	c.give(s, reply, asker{head: h.isHEAD, minor: h.Minor, close: closing})
	d.dead = closing
	if !closing {
		d.skip, d.skipped, d.strip = true, 0, nil
		d.beginBody(h)
	}
}

// give replies to the client at once, or when the responses it is owed first
// are complete.
func (c *Conn) give(s *step, reply *Reply, a asker) {
	if c.up.eof {
		c.end(s.out) // the client has seen the end of what it gets
		return
	}
	if c.outstanding.empty() {
		from := len(s.out.buf)
		s.out.buf = reply.render(s.out.buf, a)
		s.out.Reply = append(s.out.Reply, s.out.buf[from:len(s.out.buf):len(s.out.buf)])
		if a.close {
			c.end(s.out)
		}
		return
	}
	e := entry{seq: c.down.seq, bits: isLocal}
	if a.close {
		e.bits |= isLast
	}
	c.outstanding.push(e)
	c.outstanding.replies = append(c.outstanding.replies, reply.render(nil, a))
}

func (c *Conn) requestBody(s *step) (progress bool) {
	d := &c.down
	lim := limits{trailer: c.cfg.maxHead(), strip: c.cfg.Strip, more: d.strip, request: true}
	if !d.skip {
		progress, f := d.body.advance(s, &lim)
		if f.bad() {
			c.refuseBody(s, f)
			return true
		}
		return progress
	}
	s.flush()
	from := s.pos
	progress, f := d.body.advance(s, &lim)
	s.start = s.pos
	d.skipped += int64(s.pos - from)
	if f.bad() || d.skipped > c.cfg.maxSkip() {
		c.abandon(s)
	}
	return progress
}

// abandon ends the connection behind the last answer it is owed, which was
// given or lies in the queue.
func (c *Conn) abandon(s *step) {
	c.down.dead = true
	if c.outstanding.empty() {
		c.end(s.out)
		return
	}
	c.outstanding.at(c.outstanding.tail - 1).bits |= isLast
}
