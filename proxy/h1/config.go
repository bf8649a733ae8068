package h1

import "fmt"

// Mode says what happens to bytes that are not a valid request.
type Mode uint8

const (
	Enforce Mode = iota // refused; the zero value, so that a forgotten mode refuses
	DryRun              // reported to Handler.Refused, then the connection is opaque
	Observe             // opaque if the first line is no request's, else refused
	Passive             // opaque, and reported where Observe would refuse
)

// Defaults and bounds. MaxOutstanding is how many requests may wait for their
// responses before the client is held: far more than pipelining clients use,
// and small enough to lie inside the Conn.
const (
	DefaultMaxHead   = 64 << 10
	DefaultMaxFields = 1000
	DefaultMaxSkip   = 64 << 10
	MaxOutstanding   = 32
	maxChunkLine     = 256 // octets of a chunk-size line with its extensions
	maxSizeDigits    = 15  // hexadecimal digits of a chunk size: below 1<<60
)

// Config is shared by many connections and read-only once the first is made. A
// zero field means the default.
type Config struct {
	Mode Mode
	// Strip names the fields that are removed from every request, head and
	// trailers. Every field that Verdict.Add writes belongs in it.
	Strip *Names
	// Upgrades are the tokens, lower case and without version, that a client may
	// ask to upgrade to in Enforce and DryRun mode. Nil means websocket only.
	// h2c is never among them: it is taken out of the request, and the server ignores it.
	// The token connect stands for the method CONNECT, for services that are proxies.
	Upgrades []string
	MaxHead  int // octets of a message head, or of a trailer section
	// MaxFields is the number of field lines in a head. Servers drop lines past a
	// count of their own, so that ours also go first.
	MaxFields int
	// MaxSkip is how many octets of a refused request's body are read and thrown
	// away to keep the connection for the next one. With more it is closed.
	MaxSkip int64
}

func (c *Config) maxHead() int { return orDefault(c.MaxHead, DefaultMaxHead) }

func (c *Config) maxFields() int { return orDefault(c.MaxFields, DefaultMaxFields) }

func (c *Config) maxSkip() int64 { return orDefault(c.MaxSkip, DefaultMaxSkip) }

func orDefault[T int | int64](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// Handler is asked about one connection's messages. Its methods are called
// within steps, so never at the same time when steps are serialised.
type Handler interface {
	// Request decides one request, whose head is complete and valid. h is valid
	// during the call only.
	Request(h *Head) Verdict
	// Response is told the status of the final response to request seq, when its
	// head passes.
	Response(seq uint32, status int)
	// Refused is told what the filter refuses by itself. In Enforce and Observe mode
	// the returned reply goes to the client, if one can still be given; nil means
	// a problem document with r's status and reason, and [Pass] lets the connection
	// go on as opaque. In the others it is ignored.
	Refused(r Refusal) *Reply
}

// Pass is what Refused returns for a connection that is not to be refused anything after all.
var Pass = new(Reply)

// Verdict is a Handler's answer. The zero value refuses.
type Verdict struct {
	Allow bool
	// Add is whole field lines, each with its CRLF, put right after the request
	// line of an allowed request. It is copied.
	Add []byte
	// Strip names fields to remove beside those of Config.Strip; nil for none.
	Strip *Names
	// Reply answers a request that is not allowed. Nil means a plain 403.
	Reply *Reply
}

// Refusal is what the filter refuses without asking for a decision.
type Refusal struct {
	// Status is 400, 431 or 505 for requests, 502 for responses.
	Status int
	// Reason is one short fixed phrase, fit for the peer to read.
	Reason string
	// Seq is the request's ordinal on the connection, from one; zero for a
	// response that belongs to none.
	Seq uint32
	// Upstream says that it was the server's bytes that were at fault.
	Upstream bool
}

// CutError reports a connection that cannot go on and in which nothing more can be
// said: after writing what the step gave, reset both sides.
type CutError struct{ Reason string }

func (e *CutError) Error() string { return fmt.Sprintf("h1: connection cut: %s", e.Reason) }
