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
// In [Observe] HTTP is a guess, which the first line decides. Octets are held only
// while they can still become the valid request line of a registered method;
// the octet that rules this out releases them, and so does a server that speaks
// first. There is no timer. What is released, and every other beginning, passes
// while it is looked at, up to the end of the line. If no server could take that
// for a request line, the connection is opaque. If one could, the connection is
// HTTP from there on, and held to what Enforce demands of requests: head by head,
// body by body. Even when the line itself has passed by then, no line of the
// header has. A head is held until it is complete, since lines are to be put into
// it. A client that sent part of a head and then waited for the server would get
// no answer from an HTTP server either.
//
// Two things that Enforce refuses pass in Observe: an upgrade to any protocol
// but HTTP/2, and a response that is not valid. The latter passes as it is,
// up to the connection's end, and no request follows it.
//
// [Passive] is to Observe what DryRun is to Enforce: where Observe would refuse,
// it is reported, and the connection goes on as opaque.
//
// A mode may change while a connection lives ([Conn.Configure]).
//
// # What the added lines are worth
//
// In Enforce a server never sees a client's own lines under the names in
// Config.Strip. In Observe it does not as long as it reads requests where this
// package does: behind a first line, or a header of the PROXY protocol and a first
// line, as the most lenient servers read it. Behind the preface of HTTP/2, an
// upgrade that the server granted, or bytes that the server was the first to send,
// all passes. In DryRun and Passive every refusal that is reported is a way for a
// client to write those lines itself.
package h1
