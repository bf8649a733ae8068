package h1

import "strings"

// serverBytes takes the next piece of what the server sent. It reports whether
// to go on.
func (c *Conn) serverBytes(s *step) (progress bool) {
	switch {
	case c.ended:
		s.drop(len(s.rest()))
		return false
	case c.opaque || c.up.free:
		s.pos = len(s.in)
		return false
	case s.pos == len(s.in):
		return false
	case c.outstanding.empty():
		c.unsolicited(s)
		return true
	case c.up.body.kind != noBody:
		return c.responseBody(s)
	}
	return c.responseHead(s)
}

func (c *Conn) responseHead(s *step) (progress bool) {
	raw := s.rest()
	n, f := c.up.scan.scan(raw, c.cfg.maxHead(), c.cfg.maxFields())
	if !f.bad() && !strings.HasPrefix("HTTP/1.", view(raw[:min(len(raw), len("HTTP/1."))])) {
		f = malformed("not an HTTP/1.x status line")
	}
	if n == 0 && !f.bad() {
		return false
	}
	var r responseHead
	if !f.bad() {
		c.up.scan = scanner{}
		f = r.parse(raw[:n], s.out)
	}
	if f.bad() {
		c.refuseResponse(s, f.reason)
		return true
	}
	c.response(s, &r, n)
	return true
}

// response lets a response head of n octets pass and finds out what follows it.
func (c *Conn) response(s *step, r *responseHead, n int) {
	e := *c.outstanding.front()
	opens := r.status == 101 || e.has(isCONNECT) && r.status/100 == 2
	switch {
	case r.status == 101 && !e.has(isUpgrade):
		c.refuseResponse(s, "101 to a request without upgrade")
		return
	case r.status < 200 && !opens: // interim, the final one is still to come
		s.pos += n
		return
	}
	c.handler.Response(e.seq, r.status)
	s.pos += n
	if opens {
		c.goOpaque(s.out)
		return
	}
	c.up.closes = r.closes()
	kind, length := r.frame(e)
	c.up.begun = true
	c.up.body.begin(kind, length)
	if kind == noBody {
		c.complete(s)
	}
}

func (c *Conn) responseBody(s *step) (progress bool) {
	lim := limits{trailer: c.cfg.maxHead()}
	progress, f := c.up.body.advance(s, &lim)
	if f.bad() {
		c.refuseResponse(s, f.reason)
		return true
	}
	if c.up.body.kind == noBody {
		c.complete(s)
	}
	return progress
}

// complete ends the front request, and gives the answers of our own that have
// waited for that.
func (c *Conn) complete(s *step) {
	c.up.begun = false
	c.outstanding.pop()
	s.out.Wake = s.out.Wake || c.down.held
	if c.up.closes {
		c.noMoreResponses(s)
		return
	}
	for !c.outstanding.empty() && c.outstanding.front().has(isLocal) {
		e, reply := c.outstanding.pop()
		s.insert(s.out.copied(reply))
		if e.has(isLast) {
			c.end(s.out)
			return
		}
	}
}

// noMoreResponses drops what will never be answered: the server has said that
// it closes, or has closed. Answers of our own go with it, since the client
// was told, or sees, that nothing follows.
func (c *Conn) noMoreResponses(s *step) {
	c.outstanding.clear()
	c.down.last = true
	if c.down.dead {
		c.end(s.out)
	}
	s.out.Wake = s.out.Wake || c.down.held
}

func (c *Conn) serverEOF(s *step) {
	switch {
	case c.opaque || c.ended:
		return
	case s.pos < len(s.in) && c.up.body.kind == noBody:
		c.refuseResponse(s, "incomplete response head")
		if !c.opaque && !c.up.free {
			return
		}
		s.pos = len(s.in)
	case s.pos < len(s.in):
		// The client finds the body incomplete by the same rules as we do.
		s.pos = len(s.in)
	}
	c.noMoreResponses(s)
}
