package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
)

// rule is one loaded policy and what the engine must know of it.
type rule struct {
	id     string
	place  string // file:line:col
	order  int    // position in the snapshot, so that answers do not depend on map order
	policy *cedar.Policy
	ast    *ast.Policy
	permit bool
	dryRun bool // @mode("dry-run"): never decides
	reason string
	// endpoint is set when the resource scope names an Endpoint.
	endpoint *endpoint
	// aboutEndpoints is set when the resource scope names or asks for Endpoints; such a
	// policy is asked about each endpoint of a request, all others about its service.
	aboutEndpoints bool
	// http is set when the action scope names HTTP actions, or the resource
	// scope endpoints. An unconstrained action names none.
	http bool
	// segments is set when a condition may look at context.request.segments.
	segments bool
}

// Annotations that mean something here. Others are the operator's own.
const (
	noteID       = "id"
	noteMode     = "mode"
	noteReason   = "reason"
	noteSeverity = "severity"
)

var severities = []string{"info", "low", "medium", "high", "critical"}

// newRule checks what the schema cannot: annotations and endpoint ids.
func newRule(id string, p *cedar.Policy) (*rule, error) {
	r := &rule{id: id, policy: p, ast: (*ast.Policy)(p.AST()), permit: p.Effect() == cedar.Permit}
	// From JSON they come in any order; evaluation does not look at them, the version does.
	slices.SortFunc(r.ast.Annotations, func(a, b ast.AnnotationType) int { return cmp.Compare(a.Key, b.Key) })
	var errs []error
	if err := words.validator.Policy("", r.ast); err != nil {
		errs = append(errs, err)
	}
	for key, value := range p.Annotations() {
		errs = append(errs, r.annotate(string(key), string(value)))
	}
	errs = append(errs, r.readScope(), r.checkLiterals())
	for _, c := range r.ast.Conditions {
		r.segments = r.segments || looksAtSegments(c.Body)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *rule) annotate(key, value string) error {
	switch key {
	case noteMode:
		// An unknown mode must not be taken for enforcement, nor for its absence.
		if value != "enforce" && value != "dry-run" {
			return fmt.Errorf("@mode is %q, not enforce or dry-run", value)
		}
		r.dryRun = value == "dry-run"
	case noteReason:
		r.reason = value
	case noteSeverity:
		if !slices.Contains(severities, value) {
			return fmt.Errorf("@severity is %q, not one of %s", value, strings.Join(severities, ", "))
		}
	case noteID:
	default:
		for _, known := range []string{noteID, noteMode, noteReason, noteSeverity} {
			if strings.EqualFold(key, known) {
				return fmt.Errorf("annotation @%s must be written @%s", key, known)
			}
		}
	}
	return nil
}

// readScope finds out what the policy speaks about.
func (r *rule) readScope() error {
	var errs []error
	if uid, ok := scopeEntity(r.ast.Resource); ok {
		if uid.Type == typeEndpoint {
			e, err := parseEndpoint(uid)
			r.endpoint, r.aboutEndpoints = e, true
			errs = append(errs, err)
		}
	}
	switch s := r.ast.Resource.(type) {
	case ast.ScopeTypeIs:
		r.aboutEndpoints = r.aboutEndpoints || s.Type == typeEndpoint
	case ast.ScopeTypeIsIn:
		r.aboutEndpoints = r.aboutEndpoints || s.Type == typeEndpoint
	}
	r.http = r.aboutEndpoints || namesHTTP(r.ast.Action)
	return errors.Join(errs...)
}

// looksAtSegments reports whether an expression may look at path segments: it
// names them, or takes the request or the context as a whole.
func looksAtSegments(n ast.IsNode) bool {
	found := false
	ast.Inspect(ast.NewNode(n), func(n ast.IsNode) bool {
		switch n := n.(type) {
		case ast.NodeTypeAccess:
			found = found || n.Value == "segments"
			return !isRequest(n.Arg) && !isContext(n.Arg) || isContext(n.Arg) && n.Value == "request"
		case ast.NodeTypeHas:
			return !isRequest(n.Arg) && !isContext(n.Arg)
		}
		found = found || isContext(n)
		return true
	})
	return found
}

func isContext(n ast.IsNode) bool {
	v, ok := n.(ast.NodeTypeVariable)
	return ok && v.Name == "context"
}

func isRequest(n ast.IsNode) bool {
	a, ok := n.(ast.NodeTypeAccess)
	return ok && a.Value == "request" && isContext(a.Arg)
}

// namesHTTP reports whether an action scope names an HTTP method or a group of them.
func namesHTTP(scope ast.IsActionScopeNode) bool {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return words.actionIn(s.Entity, actionHTTP)
	case ast.ScopeTypeIn:
		return words.actionIn(s.Entity, actionHTTP)
	case ast.ScopeTypeInSet:
		return slices.ContainsFunc(s.Entities, func(uid cedar.EntityUID) bool {
			return words.actionIn(uid, actionHTTP)
		})
	}
	return false
}

// actionMatches reports whether the action scope covers action.
func (r *rule) actionMatches(action cedar.EntityUID) bool {
	switch s := r.ast.Action.(type) {
	case ast.ScopeTypeEq:
		return action == s.Entity
	case ast.ScopeTypeIn:
		return words.actionIn(action, s.Entity)
	case ast.ScopeTypeInSet:
		return slices.ContainsFunc(s.Entities, func(uid cedar.EntityUID) bool {
			return words.actionIn(action, uid)
		})
	}
	return true
}

// party is an entity with all its ancestors, as scopes are matched against it.
type party struct {
	entity cedar.Entity
	above  []cedar.EntityUID
}

func (p *party) in(uid cedar.EntityUID) bool {
	return p.entity.UID == uid || slices.Contains(p.above, uid)
}

// covers reports whether a principal or resource scope matches the party.
func covers(scope ast.IsScopeNode, p *party) bool {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return p.entity.UID == s.Entity
	case ast.ScopeTypeIn:
		return p.in(s.Entity)
	case ast.ScopeTypeIs:
		return p.entity.UID.Type == s.Type
	case ast.ScopeTypeIsIn:
		return p.entity.UID.Type == s.Type && p.in(s.Entity)
	}
	return true
}

// scopeEntity returns the entity that a principal or resource scope names.
func scopeEntity(scope ast.IsScopeNode) (cedar.EntityUID, bool) {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return s.Entity, true
	case ast.ScopeTypeIn:
		return s.Entity, true
	case ast.ScopeTypeIsIn:
		return s.Entity, true
	}
	return cedar.EntityUID{}, false
}

// parseID checks an id taken from an annotation or a JSON key. Ids stand in
// logs, metrics and on command lines, so that they are short and plain.
func parseID(id string) error {
	if id == "" || len(id) > 128 {
		return fmt.Errorf("policy id %q is empty or longer than 128 bytes", id)
	}
	for i := range len(id) {
		if c := id[i]; c <= ' ' || c >= 0x7f || c == '"' || c == '\\' || c == ',' {
			return fmt.Errorf("policy id %q holds something else than printable ASCII without spaces, commas, quotes and backslashes", id)
		}
	}
	return nil
}
