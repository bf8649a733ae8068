package tunnel

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

const frameHeaderLen = 9 // RFC 9113 section 4.1

// drainPing marks the PING whose answer tells that the peer has seen our
// GOAWAY, alivePing the one that asks for life.
var (
	drainPing = [8]byte{'r', 'f', 'd', 'r', 'a', 'i', 'n'}
	alivePing = [8]byte{'r', 'f', 'a', 'l', 'i', 'v', 'e'}
)

func appendHeader(b []byte, length int, typ http2.FrameType, flags http2.Flags, stream uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), byte(typ), byte(flags),
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendSetting(b []byte, id http2.SettingID, value uint32) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(id))
	return binary.BigEndian.AppendUint32(b, value)
}

func appendWindowUpdate(b []byte, stream uint32, n int64) []byte {
	b = appendHeader(b, 4, http2.FrameWindowUpdate, 0, stream)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendReset(b []byte, stream uint32, code http2.ErrCode) []byte {
	b = appendHeader(b, 4, http2.FrameRSTStream, 0, stream)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendGoAway(b []byte, last uint32, code http2.ErrCode) []byte {
	b = appendHeader(b, 8, http2.FrameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendPing(b []byte, flags http2.Flags, data [8]byte) []byte {
	b = appendHeader(b, 8, http2.FramePing, flags, 0)
	return append(b, data[:]...)
}

// frameReader cuts the peer's octets into frames, in whatever pieces they come.
// DATA passes through piece by piece; every other frame is small and is
// gathered whole.
type frameReader struct {
	t       *Conn
	preface int // octets of the client preface still expected
	first   bool

	head  [frameHeaderLen]byte
	nhead int
	frame header
	left  int    // octets of the frame's payload still to come
	body  []byte // of a gathered frame

	// Of the DATA frame in hand.
	data    *Stream // nil: its octets are dropped
	padding int     // at the end of the payload
	padLen  bool    // the pad length octet is still to come

	block headerBlock
}

type header struct {
	length int
	typ    http2.FrameType
	flags  http2.Flags
	stream uint32
}

func (h header) has(f http2.Flags) bool { return h.flags.Has(f) }

func (r *frameReader) init(t *Conn, server bool) {
	r.t, r.first = t, true
	if server {
		r.preface = len(http2.ClientPreface)
	}
	r.block.init()
}

// feed takes the next octets. Its error ends the connection.
func (r *frameReader) feed(p []byte) error {
	for len(p) > 0 {
		var n int
		var err error
		switch {
		case r.preface > 0:
			n, err = r.takePreface(p)
		case r.nhead < frameHeaderLen:
			n, err = r.takeHead(p)
		default:
			n, err = r.takePayload(p)
		}
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

func (r *frameReader) takePreface(p []byte) (int, error) {
	rest := http2.ClientPreface[len(http2.ClientPreface)-r.preface:]
	n := min(len(rest), len(p))
	if string(p[:n]) != rest[:n] {
		return 0, protocolError("not an HTTP/2 client")
	}
	r.preface -= n
	return n, nil
}

func (r *frameReader) takeHead(p []byte) (int, error) {
	n := copy(r.head[r.nhead:], p)
	if r.nhead += n; r.nhead < frameHeaderLen {
		return n, nil
	}
	h := &r.head
	r.frame = header{
		length: int(h[0])<<16 | int(h[1])<<8 | int(h[2]),
		typ:    http2.FrameType(h[3]),
		flags:  http2.Flags(h[4]),
		stream: binary.BigEndian.Uint32(h[5:]) & (1<<31 - 1),
	}
	r.left = r.frame.length
	if err := r.begin(); err != nil {
		return 0, err
	}
	if r.left == 0 {
		return n, r.finish(nil)
	}
	return n, nil
}

// begin judges a frame by its header alone.
func (r *frameReader) begin() error {
	f := r.frame
	if r.first && (f.typ != http2.FrameSettings || f.has(http2.FlagSettingsAck)) {
		return protocolError("first frame is not SETTINGS") // RFC 9113 section 3.4
	}
	r.first = false
	limit := maxControl
	if f.typ == http2.FrameData {
		limit = maxFrame
	}
	if f.length > limit {
		return &ConnError{Code: http2.ErrCodeFrameSize, Reason: "frame is too large"}
	}
	// RFC 9113 section 6.10: nothing comes between the frames of a header block.
	if r.block.stream != 0 && (f.typ != http2.FrameContinuation || f.stream != r.block.stream) {
		return protocolError("header block is interrupted")
	}
	if f.typ == http2.FrameData {
		return r.beginData()
	}
	return nil
}

func (r *frameReader) beginData() error {
	f := r.frame
	padded := f.has(http2.FlagDataPadded)
	if f.stream == 0 || (padded && f.length == 0) {
		return protocolError("malformed DATA")
	}
	s, err := r.t.admit(f)
	if err != nil {
		return err
	}
	r.data, r.padding, r.padLen = s, 0, padded
	return nil
}

func (r *frameReader) takePayload(p []byte) (int, error) {
	n := min(r.left, len(p))
	r.left -= n
	if r.frame.typ == http2.FrameData {
		if err := r.takeData(p[:n]); err != nil {
			return 0, err
		}
		if r.left == 0 {
			return n, r.finish(nil)
		}
		return n, nil
	}
	if r.left == 0 && len(r.body) == 0 {
		return n, r.finish(p[:n]) // whole in the caller's buffer
	}
	r.body = append(r.body, p[:n]...)
	if r.left > 0 {
		return n, nil
	}
	err := r.finish(r.body)
	r.body = r.body[:0]
	return n, err
}

func (r *frameReader) takeData(p []byte) error {
	if r.padLen && len(p) > 0 {
		r.padLen, r.padding = false, int(p[0])
		if r.padding >= r.frame.length { // RFC 9113 section 6.1
			return protocolError("padding is longer than its frame")
		}
		if r.data != nil {
			r.data.Release(1 + r.padding)
		}
		p = p[1:]
	}
	// Of p, what reaches into the padding is dropped.
	if over := r.padding - r.left; over > 0 {
		p = p[:max(0, len(p)-over)]
	}
	if len(p) > 0 && r.data != nil {
		r.data.sink.OnData(p)
	}
	return nil
}

// finish acts on a frame whose payload is complete.
func (r *frameReader) finish(payload []byte) error {
	r.nhead = 0
	f := r.frame
	switch f.typ {
	case http2.FrameData:
		s := r.data
		r.data = nil
		if s != nil && f.has(http2.FlagDataEndStream) {
			s.ended()
		}
		return nil
	case http2.FrameHeaders, http2.FrameContinuation:
		return r.headers(payload)
	case http2.FrameSettings:
		return r.t.onSettings(f, payload)
	case http2.FramePing:
		return r.t.onPing(f, payload)
	case http2.FrameGoAway:
		return r.t.onGoAway(f, payload)
	case http2.FrameWindowUpdate:
		return r.t.onWindowUpdate(f, payload)
	case http2.FrameRSTStream:
		return r.t.onReset(f, payload)
	case http2.FramePushPromise:
		return protocolError("PUSH_PROMISE") // we disabled it, and clients never may
	default:
		// PRIORITY is deprecated and unknown types are ignored: RFC 9113 sections 5.3.2 and 5.5.
		return r.t.onOther(f)
	}
}
