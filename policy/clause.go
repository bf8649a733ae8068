package policy

import (
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	publicast "github.com/cedar-policy/cedar-go/ast"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/eval"
)

// maxValueText bounds one value shown beside a clause, in bytes.
const maxValueText = 300

// failing is the first part of a policy that did not hold. The zero value means that all held.
type failing struct {
	part   string   // "principal", "action", "resource", "when", "unless"
	clause string   // Cedar text
	values []string // "expression = value" for what the clause looks at
	err    error    // set when the clause could not be evaluated
}

// examine finds the first part of a rule that does not hold for a question.
func examine(r *rule, principal, resource *party, action cedar.EntityUID, context cedar.Record) failing {
	switch {
	case !covers(r.ast.Principal, principal):
		return scopeFailing("principal", r.ast.Principal, principal.entity.UID)
	case !r.actionMatches(action):
		return scopeFailing("action", r.ast.Action, action)
	case !covers(r.ast.Resource, resource):
		return scopeFailing("resource", r.ast.Resource, resource.entity.UID)
	}
	env := eval.Env{
		Entities:  parties{principal, resource},
		Principal: principal.entity.UID,
		Action:    action,
		Resource:  resource.entity.UID,
		Context:   context,
	}
	for _, c := range r.ast.Conditions {
		if f := examineCondition(c, env); f.part != "" {
			return f
		}
	}
	return failing{}
}

func examineCondition(c ast.ConditionType, env eval.Env) failing {
	holds, err := truth(c.Body, env)
	if err == nil && holds == bool(c.Condition) {
		return failing{}
	}
	part, node := "unless", c.Body
	if c.Condition == ast.ConditionWhen {
		part, node = "when", firstFalse(c.Body, env)
	}
	return failing{part, expression(node), values(node, env), err}
}

// firstFalse narrows a conjunction down to its first part that is false or
// fails. Everything else is shown as a whole: of an "or" no part is to blame alone.
func firstFalse(n ast.IsNode, env eval.Env) ast.IsNode {
	and, ok := n.(ast.NodeTypeAnd)
	if !ok {
		return n
	}
	if holds, err := truth(and.Left, env); err != nil || !holds {
		return firstFalse(and.Left, env)
	}
	return firstFalse(and.Right, env)
}

func truth(n ast.IsNode, env eval.Env) (bool, error) {
	v, err := eval.Eval(n, env)
	if err != nil {
		return false, err
	}
	b, _ := v.(cedar.Boolean)
	return bool(b), nil
}

// values lists what a clause looks at: each variable or chain of attributes in
// it, with its value here.
func values(n ast.IsNode, env eval.Env) []string {
	var found []string
	ast.Inspect(ast.NewNode(n), func(n ast.IsNode) bool {
		if !isChain(n) {
			return true
		}
		value := "(absent)"
		if v, err := eval.Eval(n, env); err == nil {
			value = string(v.MarshalCedar())
		}
		text := expression(n) + " = " + shorten(value)
		if !slices.Contains(found, text) {
			found = append(found, text)
		}
		return false
	})
	return found
}

// isChain reports whether n is a variable, or attributes of one.
func isChain(n ast.IsNode) bool {
	switch n := n.(type) {
	case ast.NodeTypeVariable:
		return true
	case ast.NodeTypeAccess:
		return isChain(n.Arg)
	}
	return false
}

func shorten(s string) string {
	if len(s) > maxValueText {
		return strings.ToValidUTF8(s[:maxValueText], "") + "..."
	}
	return s
}

// frame is what the library writes around the only condition of a policy.
var frame = strings.Split(wrapped(ast.NodeValue{Value: cedar.True}), "true")

// expression renders an expression as Cedar text, which the library does only
// for whole policies.
func expression(n ast.IsNode) string {
	return strings.TrimSuffix(strings.TrimPrefix(wrapped(n), frame[0]), frame[1])
}

func wrapped(n ast.IsNode) string {
	p := ast.Permit().When(ast.NewNode(n))
	return string(cedar.NewPolicyFromAST((*publicast.Policy)(p)).MarshalCedar())
}

func scopeFailing(part string, scope ast.IsScopeNode, actual cedar.EntityUID) failing {
	return failing{part: part, clause: scopeText(part, scope), values: []string{part + " = " + shorten(actual.String())}}
}

func scopeText(name string, scope ast.IsScopeNode) string {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return name + " == " + s.Entity.String()
	case ast.ScopeTypeIn:
		return name + " in " + s.Entity.String()
	case ast.ScopeTypeInSet:
		texts := make([]string, len(s.Entities))
		for i, uid := range s.Entities {
			texts[i] = uid.String()
		}
		return name + " in [" + strings.Join(texts, ", ") + "]"
	case ast.ScopeTypeIs:
		return name + " is " + string(s.Type)
	case ast.ScopeTypeIsIn:
		return name + " is " + string(s.Type) + " in " + s.Entity.String()
	}
	return name
}
