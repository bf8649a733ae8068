package h1

// refuseHead refuses bytes that are not a valid request. Nothing of its header
// was forwarded.
func (c *Conn) refuseHead(s *step, f fault) {
	c.down.sent, c.down.ahead = nil, 0
	reply := c.refused(Refusal{Status: f.status, Reason: f.reason, Seq: c.down.seq})
	if !c.strict() {
		c.passOrDie(s.out)
		return
	}
	s.drop(len(s.rest()))
	c.down.dead = true
	c.give(s, reply, asker{minor: 1, close: true})
}

// refuseBody refuses a request after its head, and perhaps part of its body, was
// forwarded. The server must not get the rest, so its connection ends here.
func (c *Conn) refuseBody(s *step, f fault) {
	d := &c.down
	reply := c.refused(Refusal{Status: f.status, Reason: f.reason, Seq: d.seq})
	if !c.strict() {
		c.passOrDie(s.out)
		return
	}
	s.drop(len(s.rest()))
	d.dead = true
	q := &c.outstanding
	switch {
	case c.up.free || !q.holds(d.number): // or the server answered early
		c.end(s.out)
	case q.head != d.number:
		e := q.at(d.number)
		q.replies = append(q.replies, reply.render(nil, asker{head: e.has(isHEAD), minor: 1, close: true}))
		e.bits = isLocal | isLast
	case c.up.begun:
		c.cutOff(f.reason)
	default:
		e, _ := q.pop()
		c.give(s, reply, asker{head: e.has(isHEAD), minor: 1, close: true})
	}
}

// passes is what a refusal comes to where nothing is refused: the connection
// goes on as opaque, if it can.
func (c *Conn) passes(out *Out) bool {
	if c.strict() || !c.goOpaque(out) {
		return false
	}
	c.lax = !c.guessing() && !c.pardon
	return true
}

func (c *Conn) passOrDie(out *Out) {
	if !c.passes(out) {
		c.down.dead = true
		c.outstanding.at(c.outstanding.tail - 1).bits |= isLast
	}
}

// stray deals with octets after a request that was to be the last. They belong to
// nothing: a server that kept to the protocol would not read them.
func (c *Conn) stray(s *step) {
	switch {
	case c.up.free:
		c.unheard(s)
	case !c.passes(s.out):
		c.down.dead = true
	}
}

// unheard deals with requests behind a response that was not HTTP: nobody could
// tell what answers them. A client takes the end for that of an idle connection.
func (c *Conn) unheard(s *step) {
	c.refused(Refusal{Status: 502, Reason: "request after a response that was not HTTP", Seq: c.down.seq + 1, Upstream: true})
	if !c.passes(s.out) {
		c.end(s.out)
	}
}

// truncatedRequest deals with a stream that ended within a head or a chunk line.
func (c *Conn) truncatedRequest(s *step) {
	if c.down.body.kind == noBody {
		c.down.seq++
		c.refuseHead(s, malformed("incomplete request"))
	}
	if c.strict() || c.down.skip || c.down.dead {
		s.drop(len(s.rest()))
	}
	s.pos = len(s.in)
}

// refuseResponse refuses what the server sent as an answer to the front request.
func (c *Conn) refuseResponse(s *step, reason string) {
	if c.free(s.out) {
		return
	}
	e := *c.outstanding.front()
	reply := c.refused(Refusal{Status: 502, Reason: reason, Seq: e.seq, Upstream: true})
	if c.passes(s.out) {
		return
	}
	s.drop(len(s.rest()))
	if c.up.begun || reply == nil {
		c.cutOff(reason)
		return
	}
	minor := 1
	if e.has(isMinor0) {
		minor = 0
	}
	from := len(s.out.buf)
	s.out.buf = reply.render(s.out.buf, asker{head: e.has(isHEAD), minor: minor, close: true})
	s.insert(s.out.buf[from:len(s.out.buf):len(s.out.buf)])
	c.end(s.out)
}

// unsolicited deals with server bytes that answer no request: a protocol in
// which the server speaks first, or a response smuggled ahead of its request,
// which the client would take for the answer to its next one.
func (c *Conn) unsolicited(s *step) {
	if c.free(s.out) {
		return
	}
	c.refused(Refusal{Status: 502, Reason: "response without a request", Upstream: true})
	if c.passes(s.out) {
		return
	}
	s.drop(len(s.rest()))
	c.end(s.out)
}

// free lets pass what a server says that is not HTTP, where no policy hangs on
// it: old servers answer HTTP with something of their own. Requests must not go
// on as opaque for that, so none follows.
func (c *Conn) free(out *Out) bool {
	if c.cfg.Mode != Observe && c.cfg.Mode != Passive || !c.http {
		return false
	}
	c.up.free, c.down.last = true, true
	c.down.sent, c.down.ahead = nil, 0
	out.Wake = out.Wake || c.down.waiting
	return true
}
