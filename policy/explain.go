package policy

import (
	"cmp"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

// Explanation tells how a decision came about.
type Explanation struct {
	Record decisionlog.Record `json:"record"`
	// Version is the snapshot that Policies are explained with. Exact reports
	// that it is the one that decided; else that one is gone, and the newest stands in.
	Version string `json:"version"`
	Exact   bool   `json:"exact"`
	// Policies are those that mattered, most of all first: the determining ones, then
	// the ones that failed latest. At most maxExplained of Considered.
	Policies   []Explained `json:"policies"`
	Considered int         `json:"considered"`
	// Note says why no policy was asked, if that is so.
	Note string `json:"note,omitempty"`
}

// Explained is one policy's part in a decision.
type Explained struct {
	ID          string            `json:"id"`
	Place       string            `json:"place"`  // file:line:col
	Effect      string            `json:"effect"` // "permit" or "forbid"
	DryRun      bool              `json:"dry_run,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Text        string            `json:"text"` // Cedar
	// Determining reports that the decision names it.
	Determining bool `json:"determining"`
	// Matched reports that it applied. If not, Part ("principal", "action", "resource",
	// "when", "unless") and Clause are the first that did not hold, and Values what they looked at.
	Matched bool     `json:"matched"`
	Part    string   `json:"part,omitempty"`
	Clause  string   `json:"clause,omitempty"`
	Values  []string `json:"values,omitempty"`
	// Error is why the clause could not be evaluated. A forbid with an Error refuses.
	Error string `json:"error,omitempty"`

	close int // how near it came to matching, for sorting
}

// maxExplained bounds the policies of an explanation to what somebody reads.
const maxExplained = 20

// Explain replays a recorded decision and tells for each policy that may have
// mattered whether it matched or what kept it from matching. It records nothing.
func (e *Engine) Explain(rec decisionlog.Record) Explanation {
	s, exact := e.snapshotOf(rec.Version)
	x := Explanation{Record: rec, Version: s.version, Exact: exact, Policies: []Explained{}}
	if rec.Action == refused {
		x.Note = "refused before any policy was asked: " + rec.Reason
		return x
	}
	p, err := e.replay(s, &rec)
	if err != nil {
		x.Note = "the record cannot be replayed: " + err.Error()
		return x
	}
	for _, r := range s.rules {
		about := rec
		if rec.Method != "" && !p.httpOnly && !(r.dryRun && r.http) {
			about.Method = "" // the connection's permit covers its requests
		}
		x.Policies = append(x.Policies, explain(r, p, &about))
	}
	x.Considered = len(x.Policies)
	slices.SortStableFunc(x.Policies, func(a, b Explained) int {
		return cmp.Or(cmp.Compare(rank(&a), rank(&b)), -cmp.Compare(a.close, b.close))
	})
	x.Policies = slices.Clip(x.Policies[:min(len(x.Policies), maxExplained)])
	return x
}

func (e *Engine) snapshotOf(version string) (s *snapshot, exact bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.snap.Load()
	for _, s := range append([]*snapshot{now}, e.past...) {
		if s.version == version {
			return s, true
		}
	}
	return now, false
}

// replay prepares the pair of a record, outside of the snapshot's own.
func (e *Engine) replay(s *snapshot, rec *decisionlog.Record) (*pair, error) {
	c := authz.Connection{Scope: rec.Scope, Mode: rec.Mode, Side: rec.Side, Mesh: rec.Mesh}
	c.Source.Addr, c.Destination.Addr = rec.Source, rec.Destination
	var err error
	if rec.Principal != "anonymous" {
		if c.Source.ID, err = spiffeid.FromString(rec.Principal); err != nil {
			return nil, err
		}
	}
	if strings.HasPrefix(rec.Resource, "spiffe://") {
		if c.Destination.ID, err = spiffeid.FromString(rec.Resource); err != nil {
			return nil, err
		}
	}
	return s.newPair(keyFor(&c, e.external(&c))), nil
}

// explain examines one rule for what a record was about.
func explain(r *rule, p *pair, rec *decisionlog.Record) Explained {
	action, context, resource := p.action, p.connectContext(), p.resource
	if rec.Method != "" {
		m := mapped{
			action: words.method(rec.Method), method: rec.Method, host: rec.Host,
			path: rec.Path, segments: splitPath(rec.Path), upgrade: rec.Upgrade,
		}
		action, context = m.action, m.context(p.src, p.mesh, true)
		if about := p.endpointFor(r, &m); about != nil {
			resource = about
		}
	}
	f := examine(r, p.principal, resource, action, context)
	x := Explained{
		ID: r.id, Place: r.place, Effect: "forbid", DryRun: r.dryRun, Text: string(r.policy.MarshalCedar()),
		Determining: slices.Contains(rec.Policies, r.id),
		Matched:     f.part == "",
		Part:        f.part, Clause: f.clause, Values: f.values,
		close: closeness(r, p.principal, resource, action),
	}
	if r.permit {
		x.Effect = "permit"
	}
	if f.err != nil {
		x.Error = f.err.Error()
	}
	for key, value := range r.policy.Annotations() {
		if x.Annotations == nil {
			x.Annotations = make(map[string]string)
		}
		x.Annotations[string(key)] = string(value)
	}
	return x
}

// endpointFor returns the endpoint a rule about endpoints is asked about, nil
// when the request belongs to none that it covers.
func (p *pair) endpointFor(r *rule, m *mapped) *party {
	if !r.aboutEndpoints {
		return nil
	}
	for e := range p.snap.routes[p.resource.entity.UID].matching(m) {
		if about := endpointOf(e, p.resource); covers(r.ast.Resource, about) {
			return about
		}
	}
	return nil
}

// rank sorts what an operator wants to see first: what decided, what matched, what
// failed, and then permits before forbids, because a forbid that did not match changed nothing.
func rank(x *Explained) int {
	switch {
	case x.Determining:
		return 0
	case x.Matched:
		return 1
	case x.Error != "":
		return 2
	case x.Effect == "permit":
		return 3
	}
	return 4
}

// closeness tells how near a policy came to matching: the resource counts most,
// since policies are written about services, then the action, then the caller.
func closeness(r *rule, principal, resource *party, action cedar.EntityUID) int {
	n := 0
	if covers(r.ast.Resource, resource) {
		n += 4
	}
	if r.actionMatches(action) {
		n += 2
	}
	if covers(r.ast.Principal, principal) {
		n++
	}
	return n
}
