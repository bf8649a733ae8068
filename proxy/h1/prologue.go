package h1

import (
	"encoding/binary"
	"strings"
)

// A balancer that speaks the PROXY protocol begins a connection with a header
// that tells whom it balances for. The server's protocol begins behind it, and
// so does the guess: HTTP that comes through a balancer is HTTP.
// https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, sections 2.1 and 2.2.
const (
	proxyV2      = "\r\n\r\n\x00\r\nQUIT\n"
	proxyV2Fixed = len(proxyV2) + 4 // with version, family, and the length of what follows
	longestV1    = 107
)

// prologue says which part of a PROXY header is to come.
type prologue uint8

const (
	noPrologue prologue = iota
	fixedPart           // of a header of version 2
	lastPart            // downstream.left octets
)

// findPrologue looks for a PROXY header in what turned out not to be HTTP.
func (c *Conn) findPrologue(s *step) (found bool) {
	d := &c.down
	all := append(d.sent[:len(d.sent):len(d.sent)], s.rest()...)
	switch {
	case len(all) < d.line.seen: // too long to be remembered
		return false
	case d.line.is("PROXY") && all[d.line.seen-1] == '\n' && d.line.seen <= longestV1:
		d.prologue, d.left = lastPart, d.line.seen-d.ahead
	case strings.HasPrefix(proxyV2, view(all[:min(len(all), len(proxyV2))])):
		d.prologue = fixedPart
	default:
		return false
	}
	return true
}

// passPrologue lets the header pass, and begins anew behind it.
func (c *Conn) passPrologue(s *step) {
	d := &c.down
	if d.prologue == fixedPart {
		c.passFixedPart(s)
		return
	}
	n := min(d.left, len(s.rest()))
	s.pos += n
	if d.left -= n; d.left == 0 {
		d.prologue, d.line, d.sent, d.ahead = noPrologue, firstLine{}, nil, 0
	}
}

func (c *Conn) passFixedPart(s *step) {
	d := &c.down
	n := min(proxyV2Fixed-d.ahead, len(s.rest()))
	d.sent = append(d.sent, s.rest()[:n]...)
	d.ahead += n
	s.pos += n
	switch {
	case !strings.HasPrefix(view(d.sent), proxyV2[:min(len(d.sent), len(proxyV2))]):
		d.sent, d.ahead = nil, 0
		c.goOpaque(s.out)
	case d.ahead == proxyV2Fixed:
		d.prologue, d.left = lastPart, int(binary.BigEndian.Uint16(d.sent[proxyV2Fixed-2:]))
		c.passPrologue(s)
	}
}
