package policy

import (
	"iter"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"

	"ringfence.dev/policy/authz"
)

// refused stands for an action where a refusal was not a policy's.
const refused = "refuse"

// maxNamed bounds the policies a decision names; a caller needs to know why, not all of it.
const maxNamed = 8

// verdict is the answer to a question before a scope's mode is applied. Read-only
// once made: it is shared by all who ask the same.
type verdict struct {
	allowed   bool
	forbidden bool // a forbid matched, or failed
	failed    bool // a forbid failed
	policies  []string
	reason    string
	// What the policies in dry-run would have made of it; shadowed tells that
	// it would have been another outcome.
	shadowed       bool
	shadowPolicies []string
	shadowReason   string
	// The canonical request, for the record.
	action string
	path   string
	host   string
}

// question is what some of the rules are asked about.
type question struct {
	resource *party
	rules    []*rule
}

func (q question) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, r := range q.rules {
			if !yield(cedar.PolicyID(r.id), r.policy) {
				return
			}
		}
	}
}

// tally gathers the answers of the questions that make up one decision.
type tally struct {
	snap            *snapshot
	permits, denies []string
	failed          string // the first forbid that failed, with its error
}

func (t *tally) ask(p *pair, action cedar.EntityUID, context cedar.Record, q question) {
	if len(q.rules) == 0 {
		return
	}
	decision, diag := cedar.Authorize(q, parties{p.principal, q.resource}, cedar.Request{
		Principal: p.principal.entity.UID,
		Action:    action,
		Resource:  q.resource.entity.UID,
		Context:   context,
	})
	for _, reason := range diag.Reasons {
		if decision == cedar.Allow {
			t.permits = append(t.permits, string(reason.PolicyID))
		} else {
			t.denies = append(t.denies, string(reason.PolicyID))
		}
	}
	for _, e := range diag.Errors {
		// Cedar leaves out a policy that fails. For a forbid that would mean to
		// permit what could not be examined, so it counts as having matched.
		if r := t.snap.byID[string(e.PolicyID)]; !r.permit {
			t.denies = append(t.denies, r.id)
			if t.failed == "" {
				t.failed = "policy " + r.id + " could not be evaluated: " + e.Message
			}
		}
	}
}

// split divides rules into those that decide and those in dry-run.
func split(rules []*rule) (deciding, shadow []*rule) {
	i := slices.IndexFunc(rules, func(r *rule) bool { return r.dryRun })
	if i < 0 {
		return rules, nil
	}
	for _, r := range rules {
		if r.dryRun {
			shadow = append(shadow, r)
		} else {
			deciding = append(deciding, r)
		}
	}
	return deciding, shadow
}

// decide asks all questions, of the deciding rules and of those in dry-run.
func (p *pair) decide(action cedar.EntityUID, context cedar.Record, questions []question) verdict {
	main, shadow := p.tally(action, context, questions)
	v := main.verdict()
	v.shade(&shadow)
	v.action = string(action.ID)
	return v
}

func (p *pair) tally(action cedar.EntityUID, context cedar.Record, questions []question) (main, shadow tally) {
	main.snap, shadow.snap = p.snap, p.snap
	for _, q := range questions {
		deciding, dry := split(q.rules)
		main.ask(p, action, context, question{q.resource, deciding})
		shadow.ask(p, action, context, question{q.resource, dry})
	}
	return main, shadow
}

// shade notes what the policies in dry-run would have changed.
func (v *verdict) shade(shadow *tally) {
	refuses := v.allowed && len(shadow.denies) > 0
	allows := !v.allowed && !v.forbidden && len(shadow.denies) == 0 && len(shadow.permits) > 0
	if !refuses && !allows {
		return
	}
	would := shadow.verdict()
	v.shadowed, v.shadowPolicies, v.shadowReason = true, would.policies, would.reason
}

func (t *tally) verdict() verdict {
	switch {
	case len(t.denies) > 0:
		reason := t.failed
		if reason == "" {
			reason = t.snap.reason(t.denies, "forbidden by policy ")
		}
		return verdict{forbidden: true, failed: t.failed != "", policies: named(t.denies), reason: reason}
	case len(t.permits) > 0:
		return verdict{allowed: true, policies: named(t.permits), reason: t.snap.reason(t.permits, "permitted by policy ")}
	case t.snap.decided == 0:
		return verdict{reason: "no policy is loaded"}
	}
	return verdict{reason: "no policy permits it"}
}

// reason is what the first policy that has a @reason says, else its id.
func (s *snapshot) reason(ids []string, prefix string) string {
	for _, id := range ids {
		if r := s.byID[id]; r.reason != "" {
			return r.reason
		}
	}
	return prefix + ids[0]
}

func named(ids []string) []string {
	slices.Sort(ids)
	ids = slices.Compact(ids)
	return slices.Clip(ids[:min(len(ids), maxNamed)])
}

// rulesFor returns the rules about services whose scopes cover the pair and the action.
func (p *pair) rulesFor(action cedar.EntityUID) []*rule {
	rules := make([]*rule, 0, len(p.rules))
	for _, r := range p.rules {
		if r.actionMatches(action) {
			rules = append(rules, r)
		}
	}
	return rules
}

// decideConnect decides the connection. On an HTTP-only service a policy that could
// permit the caller some request opens the connection too, since what then
// passes is decided request by request; a forbid on connect still refuses. That
// holds only where an agent beside the service will decide those requests: not
// for plaintext that leaves this node.
func (p *pair) decideConnect() verdict {
	v := p.decide(p.action, p.connectContext(), []question{{p.resource, p.rulesFor(p.action)}})
	if v.allowed || v.forbidden || !p.httpOnly || !p.key.trusting {
		return v
	}
	if ids := p.grants(); len(ids) > 0 {
		return verdict{
			allowed:  true,
			policies: named(ids),
			reason:   "HTTP only: each request is decided",
			action:   v.action,
		}
	}
	return v
}

// decideRequest decides a request on an HTTP-only service.
func (p *pair) decideRequest(m *mapped) verdict {
	if !p.connect.allowed {
		v := p.connect
		v.action, v.path, v.host = string(m.action.ID), m.path, m.host
		return v
	}
	questions := p.questions(m)
	v := p.decide(m.action, p.requestContext(m, questions), questions)
	v.path, v.host = m.path, m.host
	return v
}

// questions makes a request's decision up: the rules about endpoints are asked
// about each endpoint the request belongs to, all others about the service. A
// forbid in any answer refuses, a permit in any allows. Asking of the service even where an
// endpoint is known keeps `resource == Service::"..."` meaning what it says.
func (p *pair) questions(m *mapped) []question {
	questions := []question{{p.resource, p.rulesFor(m.action)}}
	for e := range p.snap.routes[p.resource.entity.UID].matching(m) {
		about := endpointOf(e, p.resource)
		var rules []*rule
		for _, r := range p.snap.aboutEndpoint[e.uid] {
			if covers(r.ast.Principal, p.principal) && r.actionMatches(m.action) {
				rules = append(rules, r)
			}
		}
		for _, r := range p.broad {
			if covers(r.ast.Resource, about) && r.actionMatches(m.action) {
				rules = append(rules, r)
			}
		}
		questions = append(questions, question{about, rules})
	}
	return questions
}

// requestContext builds the context that the questions' rules need.
func (p *pair) requestContext(m *mapped, questions []question) cedar.Record {
	segments := slices.ContainsFunc(questions, func(q question) bool {
		return slices.ContainsFunc(q.rules, func(r *rule) bool { return r.segments })
	})
	return m.context(p.src, p.mesh, segments)
}

func (p *pair) evaluate(r *authz.Request, separators bool) verdict {
	m, err := mapRequest(r, separators)
	switch {
	case !p.httpOnly:
		return p.observe(&m, err)
	case err != nil:
		raw, _, _ := strings.Cut(r.Target, "?")
		return verdict{forbidden: true, reason: err.Error(), action: refused, path: raw, host: m.host}
	}
	return p.decideRequest(&m)
}

// observe answers for a request on a service that is not HTTP-only: the
// connection's permit covers whatever it carries. HTTP policies in dry-run are asked all the
// same, so that they can be tried out before they count.
func (p *pair) observe(m *mapped, err error) verdict {
	v := p.connect
	v.action, v.host = string(m.action.ID), m.host
	if err != nil {
		return v
	}
	v.path = m.path
	var trial []question
	for _, q := range p.questions(m) {
		q.rules = slices.DeleteFunc(q.rules, func(r *rule) bool { return !r.dryRun || !r.http })
		if len(q.rules) > 0 {
			trial = append(trial, q)
		}
	}
	if v.allowed && len(trial) > 0 {
		_, shadow := p.tally(m.action, p.requestContext(m, trial), trial)
		v.shade(&shadow)
	}
	return v
}
