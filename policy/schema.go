package policy

import (
	_ "embed"
	"fmt"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

//go:embed schema.cedarschema
var schemaText string

// Schema returns the Cedar schema that every policy is validated against, in
// Cedar's own schema syntax.
func Schema() string { return schemaText }

// The entity types and the actions of the schema that the code itself speaks of.
const (
	typeTrustDomain  cedar.EntityType = "TrustDomain"
	typeNamespace    cedar.EntityType = "Namespace"
	typeAddress      cedar.EntityType = "Address"
	typeWorkload     cedar.EntityType = "Workload"
	typeAnonymous    cedar.EntityType = "Anonymous"
	typeService      cedar.EntityType = "Service"
	typeEndpoint     cedar.EntityType = "Endpoint"
	typeExternalHost cedar.EntityType = "ExternalHost"
	typeAction       cedar.EntityType = "Action"
)

var (
	actionConnect = cedar.NewEntityUID(typeAction, "connect")
	actionEgress  = cedar.NewEntityUID(typeAction, "egress")
	actionHTTP    = cedar.NewEntityUID(typeAction, "http")
	actionOther   = cedar.NewEntityUID(typeAction, "OTHER")
)

// vocabulary is the schema made ready: it never changes once built.
type vocabulary struct {
	validator *validate.Validator
	// actions holds every action and group with all its ancestors as direct
	// parents, which spares the evaluator the walk.
	actions map[cedar.EntityUID]cedar.Entity
	// methods maps a method to its action, for those that have one of their own.
	methods map[string]cedar.EntityUID
}

// words is read-only; the schema is part of the program, so that failing to
// read it is a bug that the first test would meet.
var words = mustVocabulary(schemaText)

func mustVocabulary(text string) *vocabulary {
	var s schema.Schema
	s.SetFilename("schema.cedarschema")
	if err := s.UnmarshalCedar([]byte(text)); err != nil {
		panic(fmt.Sprintf("policy: built-in schema: %v", err))
	}
	resolved, err := s.Resolve()
	if err != nil {
		panic(fmt.Sprintf("policy: built-in schema: %v", err))
	}
	v := &vocabulary{
		validator: validate.New(resolved, validate.WithStrict()),
		actions:   make(map[cedar.EntityUID]cedar.Entity, len(resolved.Actions)),
		methods:   make(map[string]cedar.EntityUID),
	}
	for uid := range resolved.Actions {
		var above []cedar.EntityUID
		for todo := []cedar.EntityUID{uid}; len(todo) > 0; todo = todo[1:] {
			for parent := range resolved.Actions[todo[0]].Entity.Parents.All() {
				above = append(above, parent)
				todo = append(todo, parent)
			}
		}
		v.actions[uid] = cedar.Entity{UID: uid, Parents: types.NewEntityUIDSet(above...)}
		if slices.Contains(above, actionHTTP) && resolved.Actions[uid].AppliesTo != nil && uid != actionOther {
			v.methods[string(uid.ID)] = uid
		}
	}
	return v
}

// actionIn reports whether action is group or lies in it.
func (v *vocabulary) actionIn(action, group cedar.EntityUID) bool {
	return action == group || v.actions[action].Parents.Contains(group)
}

// method maps an HTTP method, which is case-sensitive (RFC 9110 section 9.1), to its action.
func (v *vocabulary) method(name string) cedar.EntityUID {
	if uid, ok := v.methods[name]; ok {
		return uid
	}
	return actionOther
}
