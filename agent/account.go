package agent

import (
	"fmt"
	"path/filepath"
	"strings"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

// maxExplained bounds how many records of one id are explained at once.
const maxExplained = 100

// Decisions returns the newest records that the filter chooses, newest first.
func (a *Agent) Decisions(f admin.Filter) any {
	records := a.records(f)
	if records == nil {
		records = []decisionlog.Record{}
	}
	return records
}

// Explain accounts for the decisions recorded under an id, or for the newest
// one that the filter chooses.
func (a *Agent) Explain(f admin.Filter) (any, error) {
	var records []decisionlog.Record
	if f.ID != "" {
		id, err := authz.ParseID(f.ID)
		if err != nil {
			return nil, admin.BadRequest{Err: fmt.Errorf("%q: %w", f.ID, err)}
		}
		records = a.decisions.Find(id)
	} else {
		f.Limit = 1
		records = a.records(f)
	}
	if len(records) == 0 {
		return nil, fmt.Errorf("%w: no such decision is remembered here (the newest %d are; the log file has all of them)", admin.ErrNotFound, decisionlog.DefaultKeep)
	}
	out := make([]policy.Explanation, 0, len(records))
	for i, r := range records {
		if i == maxExplained {
			break
		}
		out = append(out, a.policies.Explain(r))
	}
	return out, nil
}

// records looks up what the filter chooses. A unit may be given as people say
// it: with or without .service, or as an executable's name.
func (a *Agent) records(f admin.Filter) []decisionlog.Record {
	filter := decisionlog.Filter{Scope: f.Scope, Refused: f.Effect == "refused"}
	var effect authz.Effect
	if f.Effect != "" && !filter.Refused {
		if effect.UnmarshalText([]byte(f.Effect)) != nil {
			return nil
		}
		filter.Effect = &effect
	}
	if f.Unit == "" {
		return a.decisions.Last(filter, f.Limit)
	}
	var chosen []decisionlog.Record
	for _, r := range a.decisions.Last(filter, decisionlog.DefaultKeep) {
		if callerIs(r, f.Unit) {
			if chosen = append(chosen, r); len(chosen) == f.Limit {
				break
			}
		}
	}
	return chosen
}

func callerIs(r decisionlog.Record, name string) bool {
	name = strings.TrimSuffix(name, ".service")
	return strings.TrimSuffix(r.Unit, ".service") == name || filepath.Base(r.Exe) == name ||
		strings.HasSuffix(r.Principal, "/sa/"+name)
}

// policyStatus fills in the decisions and the policies in force.
func (a *Agent) policyStatus(s *admin.Status) {
	p, d := a.policies.Status(), a.decisions.Status()
	s.Decisions = admin.Decisions{Permit: p.Permits, Deny: p.Denies, WouldDeny: p.WouldDenies}
	s.Policy = admin.Policy{Dir: p.Dir, Version: p.Version, Count: p.Policies, Loaded: p.LoadedAt, Error: p.LastError}
	if p.LastError != "" {
		s.Problems = append(s.Problems, "the policy files changed but were not loaded, the last good ones decide: "+p.LastError)
	}
	if d.LastError != "" {
		s.Problems = append(s.Problems, "decisions cannot be written to "+d.Path+": "+d.LastError)
	}
	s.Counters["decision_log_written"] = int64(d.Written)
	s.Counters["decision_log_dropped"] = int64(d.Dropped)
	s.Counters["policy_evaluation_failures"] = int64(p.EvaluationFailures)
	s.Counters["policy_reload_failures"] = int64(p.ReloadFailures)
}
