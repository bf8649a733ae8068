package proxy

import (
	"net/http"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/h1"
)

// strip names what a client must not be believed: the fields in which the
// relay itself speaks.
var strip = h1.NewNames(h1.IdentityFields()...)

// httpState is what a link's filter needs beside the filter.
type httpState struct {
	only     bool   // each request needs its own permit
	add      []byte // lines that tell the server its verified caller
	lax      bool   // what passes now is nothing that enforce would let
	requests uint64
}

// filterFor makes the filter of a link whose server is on this agent. Beside
// the service every connection is looked at, since HTTP servers are told their
// caller; what is not HTTP is opaque at once unless the service is HTTP-only.
func (l *link) filterFor(uri string, hash []byte) {
	l.http.only = l.session.HTTPOnly()
	if uri != "" {
		by := ""
		if !l.conn.Destination.ID.IsZero() {
			by = l.conn.Destination.ID.String()
		}
		l.http.add = h1.AppendXFCC(nil, by, uri, hash)
	}
	l.filter = h1.New(l.scope.filtering(l.http.only, l.conn.Mode), (*handler)(l))
}

// filtering is how a link is filtered. An enforcing scope refuses a request
// that is not valid on any service, because a server that reads it otherwise
// would believe what the client says in the relay's name.
func (s *Scope) filtering(only bool, mode authz.Mode) *h1.Config {
	switch {
	case only && mode == authz.Enforce:
		return &s.enforce
	case only:
		return &s.dryRun
	case mode == authz.Enforce:
		return &s.observe
	}
	return &s.passive
}

// handler answers the filter's questions. It is called with the link's lock held.
type handler link

// Request decides one request, on services where each needs its own permit.
func (h *handler) Request(head *h1.Head) h1.Verdict {
	l := (*link)(h)
	l.http.requests++
	l.scope.relay.count.requests.Add(1)
	if !l.http.only {
		return h1.Verdict{Allow: true, Add: l.http.add}
	}
	d, err := l.session.Request(&authz.Request{
		Method: head.Method, Target: head.Target, Host: head.Host, Upgrade: head.Upgrade,
	})
	if err != nil {
		return h.undecided(err)
	}
	if d.Allowed() {
		return h1.Verdict{Allow: true, Add: l.http.add}
	}
	l.scope.relay.count.requestsDenied.Add(1)
	return h1.Verdict{Reply: denial(d)}
}

// undecided is what a failing decision comes to: an enforcing scope fails closed.
func (h *handler) undecided(err error) h1.Verdict {
	l := (*link)(h)
	l.scope.relay.count.undecided.Add(1)
	d := l.session.Refuse("request could not be decided: " + err.Error())
	if d.Allowed() {
		return h1.Verdict{Allow: true, Add: l.http.add}
	}
	return h1.Verdict{Reply: h1.Deny(http.StatusServiceUnavailable, d.ID.String(), "no decision could be made")}
}

// denial is what the client may read of a refusal: that it was refused, and
// the id under which the operator finds why.
func denial(d authz.Decision) *h1.Reply {
	if d.Unauthenticated {
		return h1.Deny(http.StatusUnauthorized, d.ID.String(), "the caller has no valid identity")
	}
	return h1.Deny(http.StatusForbidden, d.ID.String(), "policy does not permit this request")
}

// Response is told of each final response.
func (h *handler) Response(_ uint32, status int) {
	class := status / 100
	if class < 1 || class > 5 {
		class = 0
	}
	(*link)(h).scope.relay.count.responses[class].Add(1)
}

// Refused records what the filter refuses by itself.
func (h *handler) Refused(r h1.Refusal) *h1.Reply {
	l := (*link)(h)
	l.scope.relay.count.malformed.Add(1)
	d := l.session.Refuse(r.Reason)
	if d.Allowed() {
		return h1.Pass
	}
	return h1.Deny(r.Status, d.ID.String(), r.Reason)
}
