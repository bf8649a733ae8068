package tunnel

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// memory is a record layer that keeps what is written.
type memory struct {
	bytes.Buffer
}

func (m *memory) write(p []byte) error { m.Buffer.Write(p); return nil }
func (m *memory) push() (bool, error)  { return false, nil }
func (m *memory) drain() error         { return nil }
func (m *memory) pending() bool        { return false }

// tally is a sink that counts, and releases at once.
type tally struct {
	s             *Stream
	octets        int
	data          []byte
	ended, resets int
}

func (k *tally) OnResponse(int) {}
func (k *tally) OnData(p []byte) {
	k.octets += len(p)
	k.data = append(k.data, p...)
	k.s.Release(len(p))
}
func (k *tally) OnEnd()        { k.ended++ }
func (k *tally) OnReset(error) { k.resets++ }

// inMemory is a server end without a socket, and the sinks of its streams.
func inMemory() (*Conn, *memory, *[]*tally) {
	m := &memory{}
	var sinks []*tally
	t := newConn(nil, false)
	t.record = m
	t.alive = time.NewTimer(time.Hour)
	t.handler = func(s *Stream, _ *Request) Sink {
		k := &tally{s: s}
		sinks = append(sinks, k)
		s.Respond(200)
		return k
	}
	return t, m, &sinks
}

func preface(frames ...func(*http2.Framer)) []byte {
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&b, nil)
	fr.AllowIllegalWrites = true
	_ = fr.WriteSettings()
	for _, f := range frames {
		f(fr)
	}
	return b.Bytes()
}

func connectBlock() []byte {
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	_ = enc.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"})
	_ = enc.WriteField(hpack.HeaderField{Name: ":authority", Value: "127.0.0.1:80"})
	return b.Bytes()
}

func open(id uint32) func(*http2.Framer) {
	return func(fr *http2.Framer) {
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: connectBlock(), EndHeaders: true})
	}
}

// FuzzReader feeds the frame reader what a peer could send: it must neither
// panic nor lose count, and pieces must mean the same as the whole.
func FuzzReader(f *testing.F) {
	f.Add(preface(), uint8(1))
	f.Add(preface(open(1), func(fr *http2.Framer) {
		_ = fr.WriteDataPadded(1, false, []byte("hello"), make([]byte, 3))
		_ = fr.WriteData(1, true, []byte("x"))
		_ = fr.WritePing(false, [8]byte{})
		_ = fr.WriteGoAway(0, 0, nil)
	}), uint8(3))
	f.Add(preface(func(fr *http2.Framer) {
		b := connectBlock()
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:2], PadLength: 4})
		_ = fr.WriteContinuation(1, true, b[2:])
		_ = fr.WriteRSTStream(1, http2.ErrCodeCancel)
	}, open(3), func(fr *http2.Framer) {
		_ = fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1})
		_ = fr.WriteWindowUpdate(3, 9)
		_ = fr.WriteRawFrame(0x77, 1, 9, []byte("?"))
	}), uint8(200))
	f.Fuzz(func(t *testing.T, in []byte, piece uint8) {
		whole, _, sinks := inMemory()
		errWhole := whole.in.feed(in)
		cut, _, pieces := inMemory()
		var errCut error
		for rest := in; len(rest) > 0 && errCut == nil; {
			n := min(len(rest), int(piece)+1)
			errCut = cut.in.feed(rest[:n])
			rest = rest[n:]
		}
		if (errWhole == nil) != (errCut == nil) || (errWhole != nil && errWhole.Error() != errCut.Error()) {
			t.Fatalf("whole: %v, in pieces: %v", errWhole, errCut)
		}
		if len(*sinks) != len(*pieces) {
			t.Fatalf("whole: %d streams, in pieces: %d", len(*sinks), len(*pieces))
		}
		for i, k := range *sinks {
			p := (*pieces)[i]
			if !bytes.Equal(k.data, p.data) || k.ended != p.ended || k.resets != p.resets || k.ended > 1 || k.resets > 1 {
				t.Fatalf("stream %d: %+v and %+v", i, k, p)
			}
		}
		if whole.unread != 0 && errWhole == nil {
			// Only a DATA frame that is still under way may be owed.
			if whole.in.nhead != frameHeaderLen || whole.unread > maxFrame {
				t.Fatalf("%d octets are unaccounted for", whole.unread)
			}
		}
		if len(whole.out) > maxPending+2*maxAnswers+len(in)*2 {
			t.Fatalf("%d octets queued for %d received", len(whole.out), len(in))
		}
	})
}

func TestKeepAlive(t *testing.T) {
	c, m, _ := inMemory()
	defer c.alive.Stop()
	if err := c.in.feed(preface()); err != nil {
		t.Fatal(err)
	}
	c.keepAlive() // frames were seen: nothing to ask
	if c.kick(); bytes.Contains(m.Bytes(), alivePing[:]) {
		t.Error("PING to a peer that speaks")
	}
	c.keepAlive()
	if !bytes.Contains(m.Bytes(), alivePing[:]) || c.Err() != nil {
		t.Fatalf("no PING to a silent peer (%v)", c.Err())
	}
	c.keepAlive()
	if c.Err() != nil {
		t.Error("dead before its time")
	}
	c.pinged = time.Now().Add(-pingTimeout)
	c.keepAlive()
	if !errors.Is(c.Err(), ErrTimeout) {
		t.Errorf("a peer that owes us an answer for %v: %v", pingTimeout, c.Err())
	}
}

func TestKeepAliveIsSatisfiedByAnyFrame(t *testing.T) {
	c, _, _ := inMemory()
	defer c.alive.Stop()
	if err := c.in.feed(preface()); err != nil {
		t.Fatal(err)
	}
	c.keepAlive()
	c.keepAlive()
	c.pinged = time.Now().Add(-time.Hour)
	var b bytes.Buffer
	_ = http2.NewFramer(&b, nil).WritePing(true, alivePing)
	if err := c.in.feed(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	if c.keepAlive(); c.Err() != nil || !c.pinged.IsZero() {
		t.Errorf("the answer did not count: %v", c.Err())
	}
}

func TestServerEndsUnusedConnection(t *testing.T) {
	c, m, _ := inMemory()
	defer c.alive.Stop()
	if err := c.in.feed(preface()); err != nil {
		t.Fatal(err)
	}
	for range int(serverIdle / pingInterval) {
		c.frames++ // a peer that answers PINGs
		c.keepAlive()
	}
	if !c.Draining() || !bytes.Contains(m.Bytes(), drainPing[:]) {
		t.Error("an unused connection is kept for ever")
	}
}

func TestPortOf(t *testing.T) {
	for name, want := range map[string]uint16{
		ServerName(1): 1, ServerName(80): 80, ServerName(65535): 65535,
		"": 0, "p80": 0, "p80.example.com": 0, ".ringfence.internal": 0, "p.ringfence.internal": 0,
		"p0.ringfence.internal": 0, "p080.ringfence.internal": 0, "p65536.ringfence.internal": 0,
		"p+80.ringfence.internal": 0, "x80.ringfence.internal": 0, "p8 0.ringfence.internal": 0,
	} {
		if got, named := portOf(name); named != (want != 0) || (named && got != want) {
			t.Errorf("portOf(%q) = %d, %v", name, got, named)
		}
	}
}

func BenchmarkReader(b *testing.B) {
	c, _, sinks := inMemory()
	if err := c.in.feed(preface(open(1))); err != nil {
		b.Fatal(err)
	}
	var buf bytes.Buffer
	_ = http2.NewFramer(&buf, nil).WriteData(1, false, make([]byte, 200))
	frame := buf.Bytes()
	k := (*sinks)[0]
	b.ReportAllocs()
	for b.Loop() {
		k.data = k.data[:0]
		if err := c.in.feed(frame); err != nil {
			b.Fatal(err)
		}
	}
}
