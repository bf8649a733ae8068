package h1

import "strings"

// guessing reports whether HTTP is still a guess.
func (c *Conn) guessing() bool {
	return !c.http && (c.cfg.Mode == Observe || c.cfg.Mode == Passive)
}

// strict reports whether what is not valid is refused.
func (c *Conn) strict() bool {
	return (c.cfg.Mode == Enforce || c.cfg.Mode == Observe && c.http) && !c.pardon
}

// guess finds out what the connection is. It holds what can still become a
// registered method's request line or HTTP/2's preface. Everything else passes
// while it is looked at, and is remembered as far as a head may go, because it
// may be the beginning of one whose other lines have not passed.
func (c *Conn) guess(s *step) (progress bool) {
	d := &c.down
	raw := s.rest()
	if d.prologue != noPrologue {
		c.passPrologue(s)
		return true
	}
	if d.ahead == 0 && strings.HasPrefix(preface, view(raw[:min(len(raw), len(preface))])) {
		return len(raw) >= len(preface) && c.goOpaque(s.out)
	}
	switch d.line.look(raw[d.line.seen-d.ahead:]) {
	case notHTTP:
		if c.findPrologue(s) {
			return true
		}
		d.sent, d.ahead = nil, 0
		return c.goOpaque(s.out)
	case isHTTP:
		c.http = true
		if d.ahead > 0 {
			c.lateLine(s)
		}
		return true
	}
	if d.ahead == 0 && d.line.holds() && len(raw) < c.cfg.maxHead() {
		return false
	}
	if d.ahead += len(raw); d.ahead < c.cfg.maxHead() {
		d.sent = append(d.sent, raw...)
	}
	s.pos = len(s.in)
	return false
}

// lateLine takes the rest of a first line that turned out to be a request's
// when some of it had passed. What follows is a head without its first line.
func (c *Conn) lateLine(s *step) {
	d := &c.down
	n := d.line.seen - d.ahead
	line := append(d.sent, s.rest()[:n]...)
	f := c.checkLine(line)
	if f.bad() {
		d.seq++
		c.refuseHead(s, f)
		return
	}
	s.pos += n
	d.sent, d.ahead = line, len(line)
	d.scan, d.lineOK = scanner{lines: 1}, true
}

func (c *Conn) checkLine(line []byte) fault {
	if len(line) != c.down.line.seen {
		return tooLarge("message head too large") // some of it was not remembered
	}
	var lines scanner
	if _, f := lines.scan(line, c.cfg.maxHead(), 1); f.bad() {
		return f
	}
	if lines.lines == 0 {
		return malformed("not an HTTP request line")
	}
	var h Head
	return h.parseLine(line)
}

// wholeHead is the head that ends with the octets rest, which have not passed.
func (d *downstream) wholeHead(rest []byte) []byte {
	if d.ahead == 0 {
		return rest
	}
	return append(d.sent, rest...)
}
