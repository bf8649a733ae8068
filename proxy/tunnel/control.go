package tunnel

import (
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/net/http2"
)

// admit accounts for a DATA frame by its header and finds its stream. A nil
// stream means that the octets are to be dropped.
func (t *Conn) admit(f header) (*Stream, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.frames++
	if f.length == 0 && !f.has(http2.FlagDataEndStream) {
		if t.counts.empty++; t.counts.empty > maxEmptyData {
			return nil, floodError("flood of empty DATA frames")
		}
	}
	n := int64(f.length)
	if t.recvWindow -= n; t.recvWindow < 0 {
		return nil, &ConnError{Code: http2.ErrCodeFlowControl, Reason: "connection window overrun"}
	}
	if t.recvCredit += n; t.recvCredit >= connWindow/4 {
		t.out = appendWindowUpdate(t.out, 0, t.recvCredit)
		t.recvWindow += t.recvCredit
		t.recvCredit = 0
	}
	t.stats.BytesIn += uint64(n)
	s := t.streams[f.stream]
	if s == nil {
		if t.idleLocked(f.stream) {
			return nil, protocolError("DATA on an idle stream")
		}
		return nil, nil // reset by us a moment ago: RFC 9113 section 5.1, "closed"
	}
	if s.remoteEnd || (t.client && !s.answered) {
		s.resetLocked(http2.ErrCodeStreamClosed)
		return nil, nil
	}
	if s.recvWindow -= n; s.recvWindow < 0 {
		s.resetLocked(http2.ErrCodeFlowControl)
		return nil, nil
	}
	s.unread += n
	t.unread += n
	return s, nil
}

// idleLocked reports whether a stream was never opened (RFC 9113 section 5.1.1).
func (t *Conn) idleLocked(stream uint32) bool {
	return stream%2 == 0 || stream > t.lastID
}

// answerLocked counts what the peer makes us queue. A peer that sends and does
// not read is cut off before the queue grows.
func (t *Conn) answerLocked(octets int) error {
	if t.answers += octets; t.answers > maxAnswers {
		return floodError("peer does not read our answers")
	}
	return nil
}

func (t *Conn) onSettings(f header, p []byte) error {
	if f.stream != 0 || len(p)%6 != 0 || (f.has(http2.FlagSettingsAck) && len(p) != 0) {
		return &ConnError{Code: http2.ErrCodeFrameSize, Reason: "malformed SETTINGS"}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.frames++
	if t.counts.settings++; t.counts.settings > maxSettings {
		return floodError("flood of SETTINGS")
	}
	if f.has(http2.FlagSettingsAck) {
		return nil
	}
	for ; len(p) > 0; p = p[6:] {
		id := http2.SettingID(binary.BigEndian.Uint16(p))
		if err := t.applyLocked(http2.Setting{ID: id, Val: binary.BigEndian.Uint32(p[2:])}); err != nil {
			return err
		}
	}
	select {
	case <-t.ready:
	default:
		close(t.ready)
	}
	t.out = appendHeader(t.out, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	return t.answerLocked(frameHeaderLen)
}

func (t *Conn) applyLocked(s http2.Setting) error {
	if err := s.Valid(); err != nil {
		if s.ID == http2.SettingInitialWindowSize {
			return &ConnError{Code: http2.ErrCodeFlowControl, Reason: "bad initial window"}
		}
		return protocolError(fmt.Sprintf("bad setting %v", s))
	}
	switch s.ID {
	case http2.SettingHeaderTableSize:
		t.enc.SetMaxDynamicTableSize(min(s.Val, 4096))
	case http2.SettingMaxConcurrentStreams:
		t.peerStreams = s.Val
	case http2.SettingMaxFrameSize:
		t.peerFrame = int(s.Val)
	case http2.SettingInitialWindowSize:
		// RFC 9113 section 6.9.2: open streams change by the difference, and may go below zero.
		delta := int64(s.Val) - t.peerInitial
		t.peerInitial = int64(s.Val)
		for _, st := range t.streams {
			if st.sendWindow += delta; st.sendWindow > 1<<31-1 {
				return &ConnError{Code: http2.ErrCodeFlowControl, Reason: "stream window overflow"}
			}
			st.wakeLocked()
		}
	}
	return nil
}

func (t *Conn) onPing(f header, p []byte) error {
	if f.stream != 0 {
		return protocolError("PING on a stream")
	}
	if len(p) != 8 {
		return &ConnError{Code: http2.ErrCodeFrameSize, Reason: "malformed PING"}
	}
	t.mu.Lock()
	t.frames++
	if f.has(http2.FlagPingAck) {
		drained := [8]byte(p) == drainPing && t.draining && !t.client && !t.final
		if drained {
			t.final = true
			t.out = appendGoAway(t.out, t.lastID, http2.ErrCodeNo)
		}
		over := drained && t.overLocked()
		t.mu.Unlock()
		if over {
			t.Close()
		}
		return nil
	}
	defer t.mu.Unlock()
	if t.counts.pings++; t.counts.pings > maxPings {
		return floodError("flood of PING")
	}
	t.out = appendPing(t.out, http2.FlagPingAck, [8]byte(p))
	return t.answerLocked(frameHeaderLen + 8)
}

// onGoAway: a client opens no more streams here, and those beyond the last
// processed one may be opened elsewhere.
func (t *Conn) onGoAway(f header, p []byte) error {
	if f.stream != 0 || len(p) < 8 {
		return &ConnError{Code: http2.ErrCodeFrameSize, Reason: "malformed GOAWAY"}
	}
	last := binary.BigEndian.Uint32(p) & (1<<31 - 1)
	code := http2.ErrCode(binary.BigEndian.Uint32(p[4:]))
	var lost []*Stream
	t.mu.Lock()
	t.frames++
	t.draining = true
	if !t.client {
		t.final = true // the client is leaving: nothing is under way
	} else {
		for id, s := range t.streams {
			if id > last {
				lost = append(lost, s)
			}
		}
		for _, s := range lost {
			s.overLocked()
		}
	}
	over := t.overLocked()
	t.mu.Unlock()
	for _, s := range lost {
		s.sink.OnReset(&StreamError{Code: http2.ErrCodeRefusedStream, Remote: true})
	}
	if over {
		if code != http2.ErrCodeNo {
			return &GoAwayError{Code: code}
		}
		t.Close()
	}
	return nil
}

func (t *Conn) onWindowUpdate(f header, p []byte) error {
	if len(p) != 4 {
		return &ConnError{Code: http2.ErrCodeFrameSize, Reason: "malformed WINDOW_UPDATE"}
	}
	n := int64(binary.BigEndian.Uint32(p) & (1<<31 - 1))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.frames++
	if f.stream == 0 {
		if t.sendWindow += n; n == 0 || t.sendWindow > 1<<31-1 {
			return &ConnError{Code: http2.ErrCodeFlowControl, Reason: "bad connection window update"}
		}
		t.wakeLocked()
		return nil
	}
	s := t.streams[f.stream]
	if s == nil {
		if t.idleLocked(f.stream) {
			return protocolError("WINDOW_UPDATE on an idle stream")
		}
		return nil
	}
	if s.sendWindow += n; n == 0 || s.sendWindow > 1<<31-1 {
		s.resetLocked(http2.ErrCodeFlowControl) // RFC 9113 section 6.9.1
		return nil
	}
	s.wakeLocked()
	return nil
}

func (t *Conn) onReset(f header, p []byte) error {
	if f.stream == 0 {
		return protocolError("RST_STREAM on the connection")
	}
	if len(p) != 4 {
		return &ConnError{Code: http2.ErrCodeFrameSize, Reason: "malformed RST_STREAM"}
	}
	t.mu.Lock()
	t.frames++
	s := t.streams[f.stream]
	if s == nil {
		idle := t.idleLocked(f.stream)
		t.mu.Unlock()
		if idle {
			return protocolError("RST_STREAM on an idle stream")
		}
		return nil
	}
	s.overLocked()
	over := t.overLocked()
	t.mu.Unlock()
	s.sink.OnReset(&StreamError{Code: http2.ErrCode(binary.BigEndian.Uint32(p)), Remote: true})
	if over {
		t.Close()
	}
	return nil
}

func (t *Conn) onOther(header) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.frames++
	if t.counts.other++; t.counts.other > maxOtherKinds {
		return floodError("flood of frames without meaning")
	}
	return nil
}

// keepAlive runs every pingInterval: it asks a silent peer for a sign of life,
// gives up on one that owes it, and starts the flood counters anew.
func (t *Conn) keepAlive() {
	now := time.Now()
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return
	}
	silent := t.frames == t.seen
	t.seen = t.frames
	t.counts.settings, t.counts.pings, t.counts.empty, t.counts.refused, t.counts.other = 0, 0, 0, 0, 0
	dead := silent && !t.pinged.IsZero() && now.Sub(t.pinged) >= pingTimeout
	switch {
	case !silent:
		t.pinged = time.Time{}
	case t.pinged.IsZero():
		t.pinged = now
		t.out = appendPing(t.out, 0, alivePing)
	}
	if silent && !t.flushing {
		t.trimLocked()
	}
	if len(t.streams) > 0 {
		t.idleFor = 0
	} else {
		t.idleFor += pingInterval
	}
	unused := !t.client && t.idleFor >= serverIdle
	t.alive.Reset(pingInterval)
	t.mu.Unlock()
	switch {
	case dead:
		t.fail(ErrTimeout)
	case unused:
		t.GoAway()
	}
	t.kick()
}

// trimLocked lets go of the buffers of a tunnel in which nothing moves.
func (t *Conn) trimLocked() {
	t.spare = nil
	if len(t.out) == 0 {
		t.out = nil
	}
	if t.wire != nil {
		t.wire.trim()
	}
}
