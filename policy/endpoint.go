package policy

import (
	"fmt"
	"iter"
	"strings"

	"github.com/cedar-policy/cedar-go"
)

// endpoint is what the id of an Endpoint entity says: "<service> <METHOD> <template>".
type endpoint struct {
	uid      cedar.EntityUID
	service  string
	method   string // "*" for any
	template string
	segments []string // "" matches any one segment
	rest     bool     // the last part was {name...}: any number of segments may follow
}

// parseEndpoint reads the id of an Endpoint entity. The template is a
// canonical path; a segment {name} stands for any one segment, and {name...} at the end for
// all that follow, also none.
func parseEndpoint(uid cedar.EntityUID) (*endpoint, error) {
	parts := strings.Split(string(uid.ID), " ")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" {
		return nil, fmt.Errorf("endpoint %q is not of the form <service> <METHOD or *> <path template>", uid.ID)
	}
	e := &endpoint{uid: uid, service: parts[0], method: parts[1], template: parts[2]}
	if e.method != "*" && !isToken(e.method) {
		return nil, fmt.Errorf("endpoint %q: %q is no method", uid.ID, e.method)
	}
	if !strings.HasPrefix(e.template, "/") {
		return nil, fmt.Errorf("endpoint %q: the template does not begin with a slash", uid.ID)
	}
	for _, seg := range splitPath(e.template) {
		if e.rest {
			return nil, fmt.Errorf("endpoint %q: {name...} must come last", uid.ID)
		}
		name, open := strings.CutPrefix(seg, "{")
		name, closed := strings.CutSuffix(name, "}")
		if open && closed {
			if name, e.rest = strings.CutSuffix(name, "..."); !e.rest {
				e.segments = append(e.segments, "")
			}
			if !isToken(name) {
				return nil, fmt.Errorf("endpoint %q: %q is no parameter name", uid.ID, name)
			}
			continue
		}
		// A literal that no canonical path can hold would never match: say so.
		if canon, err := canonicalPath("/"+seg, true); err != nil || canon != "/"+seg {
			return nil, fmt.Errorf("endpoint %q: segment %q is not in canonical form", uid.ID, seg)
		}
		e.segments = append(e.segments, seg)
	}
	return e, nil
}

// matches reports whether a request belongs to the endpoint. segments are
// those of its canonical path; an absent path (CONNECT, OPTIONS *) belongs to none.
func (e *endpoint) matches(m *mapped) bool {
	if e.method != "*" && e.method != m.method || !strings.HasPrefix(m.path, "/") {
		return false
	}
	if len(m.segments) < len(e.segments) || len(m.segments) > len(e.segments) && !e.rest {
		return false
	}
	for i, want := range e.segments {
		if want != "" && want != m.segments[i] {
			return false
		}
	}
	return true
}

// routes are the endpoints of one service, by their first segment; "" holds
// those that begin with a parameter or have none.
type routes map[string][]*endpoint

func (t routes) add(e *endpoint) {
	first := ""
	if len(e.segments) > 0 {
		first = e.segments[0]
	}
	t[first] = append(t[first], e)
}

// matching yields every endpoint that a request belongs to. More than one may
// match, and all count: which of them a server's router prefers is not known here.
func (t routes) matching(m *mapped) iter.Seq[*endpoint] {
	return func(yield func(*endpoint) bool) {
		firsts := []string{""}
		if len(m.segments) > 0 {
			firsts = append(firsts, m.segments[0])
		}
		for _, first := range firsts {
			for _, e := range t[first] {
				if e.matches(m) && !yield(e) {
					return
				}
			}
		}
	}
}

// splitPath cuts a canonical path into its segments; a trailing slash adds none.
func splitPath(path string) []string {
	path = strings.TrimSuffix(strings.TrimPrefix(path, "/"), "/")
	if path == "" {
		return nil
	}
	return strings.Split(path, "/")
}
