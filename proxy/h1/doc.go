// Package h1 is the HTTP/1.x filter: two step functions that stand between a
// client and a server, read the message heads that pass, ask a [Handler] about
// each request, and let everything else through untouched.
//
// It is a step machine: bytes in, spans out. There is no goroutine, no I/O and
// no clock in it, and nothing is allocated per request in the steady state. A
// [Conn] is one connection. The caller feeds [Conn.Downstream] with what the
// client sent and [Conn.Upstream] with what the server sent, holding one lock
// over each step and over the writing of what it gave, because answers of the
// filter's own must not overtake or split the server's.
//
// # Where the bytes go
//
//	               Downstream step            Upstream step
//	input          from the client            from the server
//	Out.Forward    to the server              to the client
//	Out.Reply      to the client              never used
//	Out.ForwardEOF half-close to the server   half-close to the client
//
// A refusal of the filter's own is in Reply when the client is owed no earlier
// response; otherwise it is kept and given by the Upstream step that completes
// the last of them, in Forward, where it follows in order.
//
// A step says how many bytes it took. What it left is the beginning of
// something that is not complete (Out.NeedMore), or has to wait for the other
// direction (Out.Hold): the caller keeps it and gives it again, with more after
// it in the first case, after the other half's step said Out.Wake in the second.
// So heads are parsed where they lie and are never copied; the caller's buffer
// must be able to grow to Config.MaxHead, which is all the memory one half asks
// for. Bodies pass by reference, as far as they have come.
//
// # What is refused
//
// Everything two parsers could understand in two ways (RFC 9112 section 11.2):
// it is refused rather than repaired, since a repaired message is what request
// smuggling is made of. A server that lies about framing harms its own
// connection only: the client gets 502 when nothing of that response has left
// yet, else the connection is cut ([CutError]).
//
// # Modes
//
// [Enforce] is for services whose every request needs its own permit: what is
// not a whole valid HTTP/1 request does not pass.
//
// In [DryRun] the same checks are made and reported, but the filter itself
// refuses nothing: the connection goes on as opaque. What can still become a
// request is held as it will be once the service is enforced.
//
// In [Observe] HTTP is a guess. The first octets are held only while they can
// still begin a registered method, a space, a target and HTTP/1.x; the octet
// that rules this out makes the connection opaque at once, and so does a server
// that speaks first. There is no timer. From there on a head is held until it is
// complete, since lines are to be put into it. A client that sent part of a
// head and then waited for the server would get no answer from an HTTP server either.
//
// An opaque connection can carry anything. So the lines that the filter adds
// are worth a server's trust on an Enforce service only: elsewhere a client can
// begin with what is not quite HTTP, and write those lines itself.
package h1
