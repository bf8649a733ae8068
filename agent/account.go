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
func (a *Agent) Decisions(f admin.Filter) (any, error) {
	records, err := a.records(f)
	if records == nil {
		records = []decisionlog.Record{}
	}
	return records, err
}

// Explain accounts for the decisions recorded under an id, or for the newest
// one that the filter chooses.
func (a *Agent) Explain(f admin.Filter) (any, error) {
	records, err := a.recordsToExplain(f)
	if err != nil {
		return nil, err
	}
	if len(records) == 0 {
		return nil, fmt.Errorf("%w: no such decision is remembered here (the newest %d are; the log file has all of them)", admin.ErrNotFound, decisionlog.DefaultKeep)
	}
	records = records[:min(len(records), maxExplained)]
	out := make([]policy.Explanation, len(records))
	for i, r := range records {
		out[i] = a.policies.Explain(r)
	}
	return out, nil
}

func (a *Agent) recordsToExplain(f admin.Filter) ([]decisionlog.Record, error) {
	if f.ID == "" {
		f.Limit = 1
		return a.records(f)
	}
	id, err := authz.ParseID(f.ID)
	if err != nil {
		return nil, admin.BadRequest{Err: fmt.Errorf("%q: %w", f.ID, err)}
	}
	return a.decisions.Find(id), nil
}

// refused is what a filter says for every effect but a permit.
const refused = "refused"

// records looks up what the filter chooses. A unit may be given as people say
// it: with or without .service, or as an executable's name.
func (a *Agent) records(f admin.Filter) ([]decisionlog.Record, error) {
	filter := decisionlog.Filter{Scope: f.Scope, Refused: f.Effect == refused}
	if f.Effect != "" && !filter.Refused {
		filter.Effect = new(authz.Effect)
		if err := filter.Effect.UnmarshalText([]byte(f.Effect)); err != nil {
			return nil, admin.BadRequest{Err: fmt.Errorf("effect %q is none of permit, deny, would_deny, %s", f.Effect, refused)}
		}
	}
	if f.Unit == "" {
		return a.decisions.Last(filter, f.Limit), nil
	}
	var chosen []decisionlog.Record
	for _, r := range a.decisions.Last(filter, decisionlog.DefaultKeep) {
		if callerIs(r, f.Unit) {
			if chosen = append(chosen, r); len(chosen) == f.Limit {
				break
			}
		}
	}
	return chosen, nil
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
