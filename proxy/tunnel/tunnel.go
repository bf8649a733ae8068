// Package tunnel carries many TCP connections between two agents inside one
// mutual TLS connection: HBONE, which is HTTP/2 CONNECT on port 15008, one
// stream per carried connection, as Istio ambient speaks it.
//
// It is a CONNECT-only HTTP/2 endpoint (RFC 9113 section 8.5) of our own,
// because a general one costs several times the CPU. Its shape:
//
//   - Reading is push. One goroutine reads the connection and hands each
//     stream's octets to the stream's [Sink], which must not block. So nothing
//     that waits for one stream ever holds up another.
//   - Writing combines. A frame is appended under the lock; whoever finds nobody
//     flushing yields once and flushes what has gathered. A flush never waits
//     for the socket: what the kernel does not take is left to a goroutine that
//     lives only as long as the congestion.
//   - Connection credit is returned on receipt, stream credit when the sink has
//     got rid of the octets, so a stalled stream stops only itself.
//
// The package knows SPIFFE IDs but not policy: who may talk is the relay's affair.
//
// The invariant: a Conn exists only with a verified peer, and no octet of a
// stream is passed on in a different order from the one it was sent in.
package tunnel

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/net/http2"
)

// Port is where HBONE is spoken.
const Port = 15008

// Sizes and limits. The receive side's worst case per connection follows from
// them: maxStreams times initialWindow plus growthBudget, 48 MiB, and only when
// an authenticated peer fills every stream towards readers that all stall.
const (
	initialWindow = 256 << 10 // stream credit at the start
	maxWindow     = 4 << 20   // stream credit that a reader can grow to
	growthBudget  = 16 << 20  // credit above initialWindow, over all streams
	connWindow    = 4 << 20   // octets in flight; returned on receipt, so no reader limits it
	maxStreams    = 128       // streams a peer may have open; our own pool uses PoolStreams
	maxFrame      = 64 << 10  // largest DATA frame we take: one large read of the peer
	maxControl    = 16 << 10  // largest frame of any other type we take
	maxHeaderList = 16 << 10  // RFC 9113 section 6.5.2, counted as section 4.1 of RFC 7541 does
	maxHeaderRun  = 8         // CONTINUATION frames in one header block
	maxPending    = 128 << 10 // octets waiting to be flushed before writers wait
	maxAnswers    = 64 << 10  // of those, what the peer made us queue; past it the peer is flooding
	recordSize    = 16 << 10  // plaintext of a full TLS record, RFC 8446 section 5.1
	directSize    = 8 << 10   // spans from here on go to TLS without being gathered first

	// Per pingInterval, frames that cost us work and carry nothing. The most
	// seen from any peer in ordinary use is a tenth of it.
	maxSettings   = 100
	maxPings      = 1000
	maxEmptyData  = 10_000
	maxRefusals   = 1000
	maxOtherKinds = 10_000
)

// Times.
const (
	pingInterval = 10 * time.Second // a PING after this long without a frame from the peer
	pingTimeout  = 20 * time.Second // the connection is dead when that long unanswered
	farewellTime = time.Second      // for the last octets of an orderly end
	serverIdle   = 15 * time.Minute // a server ends a connection unused for so long; clients do at 5 min
)

var (
	// ErrClosed reports use of a connection or stream that was closed on this side.
	ErrClosed = errors.New("tunnel: closed")
	// ErrBusy reports a connection that takes no further stream now.
	ErrBusy = errors.New("tunnel: no free stream")
	// ErrDraining reports a connection that takes no further stream for good.
	ErrDraining = errors.New("tunnel: connection is going away")
	// ErrUnprocessed is matched by the error of a stream that the peer certainly
	// did nothing with (RFC 9113 section 8.7): it may be opened again elsewhere.
	ErrUnprocessed = errors.New("tunnel: stream was not processed")
	// ErrTimeout reports a peer that does not answer PING.
	ErrTimeout = errors.New("tunnel: peer does not answer")
)

// StreamError ends one stream. It matches [ErrUnprocessed] when the peer refused it unseen.
type StreamError struct {
	Code   http2.ErrCode
	Remote bool // the peer sent it
}

func (e *StreamError) Error() string {
	if e.Remote {
		return fmt.Sprintf("tunnel: peer reset the stream: %v", e.Code)
	}
	return fmt.Sprintf("tunnel: stream error: %v", e.Code)
}

// Is reports whether the peer refused the stream before doing anything with it.
func (e *StreamError) Is(target error) bool {
	return target == ErrUnprocessed && e.Remote && e.Code == http2.ErrCodeRefusedStream
}

// ConnError ends the connection: the peer broke the protocol or floods us.
type ConnError struct {
	Code   http2.ErrCode
	Reason string // one phrase for the operator
}

func (e *ConnError) Error() string { return fmt.Sprintf("tunnel: %s (%v)", e.Reason, e.Code) }

func protocolError(reason string) error {
	return &ConnError{Code: http2.ErrCodeProtocol, Reason: reason}
}

func floodError(reason string) error {
	return &ConnError{Code: http2.ErrCodeEnhanceYourCalm, Reason: reason}
}

// GoAwayError reports that the peer ended the connection with a code.
type GoAwayError struct{ Code http2.ErrCode }

func (e *GoAwayError) Error() string { return fmt.Sprintf("tunnel: peer went away: %v", e.Code) }

// Sink receives what the peer sends on one stream. Its methods are called by
// the connection's reader, one at a time, and must return without waiting for
// anything but short critical sections.
type Sink interface {
	// OnResponse gives the final status of the peer's answer to a CONNECT that
	// this side sent. It comes first, and only on streams opened here.
	OnResponse(status int)
	// OnData gives octets, valid only during the call. The sink calls
	// [Stream.Release] for them, now or later, once they are out of its hands.
	OnData(p []byte)
	// OnEnd tells that the peer sends no more.
	OnEnd()
	// OnReset tells that the stream is over in both directions, by RST_STREAM or
	// with the connection. It is the last call. After [Stream.Close] it does not come.
	OnReset(err error)
}

// Handler answers the streams that a peer opens. It is called by the
// connection's reader and must not block: it returns the stream's sink and
// arranges for [Stream.Respond] and [Stream.Close] to be called by somebody.
type Handler func(s *Stream, r *Request) Sink
