package tunnel

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"ringfence.dev/proxy/socket"
)

// wire is the net.Conn below crypto/tls. Downward it reads 64 KiB at a time
// and writes several TLS records with one call that never waits; upward it
// gives TLS one record at a time, so that TLS never holds more than the
// record in hand and readiness of the socket is readiness of the tunnel.
type wire struct {
	sock *socket.Conn
	// idle is called before a read that may wait, once established.
	idle func()

	// Owned by the reader, no lock.
	in     *socket.Buffer // nil: nothing read ahead
	off    int            // consumed part of in
	header [5]byte        // TLS record header, RFC 8446 section 5.1
	nhead  int            // octets of it passed up; 5 while in a record's body
	body   int            // octets of the body still to pass up
	hasty  bool           // Read gives errNotNow rather than wait

	// mu held means nobody else appends to or takes from out. The socket itself
	// is written only by the one who flushes.
	mu          sync.Mutex
	out         []byte // encrypted, not yet given to the kernel
	established bool   // before it, writes go straight through and may wait
}

// atRecord reports whether nothing of a record is in hand.
func (w *wire) atRecord() bool { return w.in == nil && w.nhead == 0 }

// ahead is how many octets were read from the socket and not passed up.
func (w *wire) ahead() int {
	if w.in == nil {
		return 0
	}
	return len(w.in.Bytes) - w.off
}

// errNotNow is what Read gives when it would have to wait and must not. It
// counts as temporary, which crypto/tls takes up again where it was.
var errNotNow net.Error = notNow{}

type notNow struct{}

func (notNow) Error() string   { return "tunnel: nothing to read just now" }
func (notNow) Timeout() bool   { return true }
func (notNow) Temporary() bool { return true }

// fill waits for octets from the socket. Nothing is borrowed while it waits.
func (w *wire) fill() error {
	if w.idle != nil {
		w.idle()
	}
	b, err := w.sock.Read()
	if err != nil {
		return err
	}
	w.in, w.off = b, 0
	return nil
}

func (w *wire) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if w.in == nil {
		if w.hasty {
			return 0, errNotNow
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
	var n int
	if w.nhead < len(w.header) {
		n = copy(p[:min(len(p), len(w.header)-w.nhead)], w.in.Bytes[w.off:])
		copy(w.header[w.nhead:], p[:n])
		w.nhead += n
		w.body = int(w.header[3])<<8 | int(w.header[4])
	} else {
		n = copy(p[:min(len(p), w.body)], w.in.Bytes[w.off:])
		w.body -= n
	}
	if w.nhead == len(w.header) && w.body == 0 {
		w.nhead = 0
	}
	if w.off += n; w.off == len(w.in.Bytes) {
		w.in.Free()
		w.in = nil
	}
	return n, nil
}

// release gives back what was read ahead, when reading is over.
func (w *wire) release() {
	w.in.Free()
	w.in = nil
}

func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.established {
		if err := w.sock.WriteAll([][]byte{p}); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	w.out = append(w.out, p...)
	return len(p), nil
}

// establish ends the handshake: from now on writes gather until push.
func (w *wire) establish(idle func()) {
	w.mu.Lock()
	w.established = true
	w.mu.Unlock()
	w.idle = idle
}

// pending reports whether something waits for push.
func (w *wire) pending() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.out) > 0
}

// push gives the kernel what has gathered. blocked means that some is left.
func (w *wire) push() (blocked bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.out) == 0 {
		return false, nil
	}
	span := [1][]byte{w.out}
	n, err := w.sock.TryWrite(span[:])
	if err != nil {
		return false, err
	}
	if n < len(w.out) {
		w.out = w.out[:copy(w.out, w.out[n:])]
		return true, nil
	}
	w.out = w.out[:0]
	return false, nil
}

// trim lets go of memory that is kept only for the next write.
func (w *wire) trim() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.out) == 0 {
		w.out = nil
	}
}

// drain writes what has gathered, waiting for the peer to make room.
func (w *wire) drain() error {
	w.mu.Lock()
	out := w.out
	w.out = nil
	w.mu.Unlock()
	err := w.sock.WriteAll([][]byte{out})
	w.mu.Lock()
	if w.out == nil {
		w.out = out[:0]
	}
	w.mu.Unlock()
	return err
}

func (w *wire) Close() error                       { return w.sock.Close() }
func (w *wire) LocalAddr() net.Addr                { return tcpAddr(w.sock.LocalAddr()) }
func (w *wire) RemoteAddr() net.Addr               { return tcpAddr(w.sock.RemoteAddr()) }
func (w *wire) SetDeadline(t time.Time) error      { return w.sock.SetDeadline(t) }
func (w *wire) SetReadDeadline(t time.Time) error  { return w.sock.SetReadDeadline(t) }
func (w *wire) SetWriteDeadline(t time.Time) error { return w.sock.SetWriteDeadline(t) }

func tcpAddr(a netip.AddrPort) net.Addr { return net.TCPAddrFromAddrPort(a) }
