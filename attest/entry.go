package attest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/attest/workload"
)

// Entry is a registration entry as an operator writes it.
type Entry struct {
	// ID is the SPIFFE ID, with a path and in the agent's trust domain.
	ID string `json:"id" yaml:"id"`
	// Selectors must all be among a workload's own for the entry to match.
	// Written type:value as in SPIRE; at least one.
	Selectors []string `json:"selectors" yaml:"selectors"`
}

// entry is a checked Entry, its selectors sorted and without repetition.
type entry struct {
	id        spiffeid.ID
	selectors []workload.Selector
}

// needs says which costly properties the entries ask for. The others are not
// looked up, and are not among a workload's selectors.
type needs struct {
	user, group, supplementary, supplementaryNames, sha256, fragment bool
}

func all() needs { return needs{true, true, true, true, true, true} }

func (n *needs) add(s workload.Selector) error {
	key, value, ok := strings.Cut(s.Value, ":")
	if !ok || value == "" {
		return fmt.Errorf("selector %s has no value", s)
	}
	switch s.Type + ":" + key {
	case "unix:uid", "unix:gid":
		return decimal(s, value)
	case "unix:supplementary_gid":
		n.supplementary = true
		return decimal(s, value)
	case "unix:supplementary_group":
		n.supplementaryNames = true
	case "unix:user":
		n.user = true
	case "unix:group":
		n.group = true
	case "unix:path", "systemd:id":
	case "unix:sha256":
		n.sha256 = true
		if len(value) != 64 || strings.Trim(value, hexDigits) != "" {
			return fmt.Errorf("selector %s: not 64 lower-case hexadecimal digits", s)
		}
	case "systemd:fragment_path":
		n.fragment = true
	default:
		// An entry that can never match is worse than a refused file.
		return fmt.Errorf("selector %s: no attestor produces unix or systemd selectors of this name, or this type at all", s)
	}
	return nil
}

func decimal(s workload.Selector, value string) error {
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil || strconv.FormatUint(n, 10) != value {
		return fmt.Errorf("selector %s: not a decimal id", s)
	}
	return nil
}

func checkEntries(td spiffeid.TrustDomain, raw []Entry) ([]entry, needs, error) {
	var want needs
	entries := make([]entry, 0, len(raw))
	for i, r := range raw {
		e, err := checkEntry(td, r, &want)
		if err != nil {
			return nil, needs{}, fmt.Errorf("registration entry %d (%s): %w", i+1, r.ID, err)
		}
		for _, other := range entries {
			if slices.Equal(other.selectors, e.selectors) && other.id != e.id {
				return nil, needs{}, fmt.Errorf("registration entries %s and %s have the same selectors", other.id, e.id)
			}
		}
		entries = append(entries, e)
	}
	return entries, want, nil
}

func checkEntry(td spiffeid.TrustDomain, r Entry, want *needs) (entry, error) {
	id, err := spiffeid.FromString(r.ID)
	switch {
	case err != nil:
		return entry{}, err
	case id.TrustDomain() != td:
		return entry{}, fmt.Errorf("not in trust domain %s", td.Name())
	case id.Path() == "":
		return entry{}, fmt.Errorf("an ID without path names an authority, not a workload")
	case len(r.ID) > maxID:
		return entry{}, fmt.Errorf("ID is longer than %d bytes", maxID)
	case len(r.Selectors) == 0:
		return entry{}, fmt.Errorf("no selectors: it would match every process")
	}
	e := entry{id: id}
	for _, text := range r.Selectors {
		s, err := workload.ParseSelector(text)
		if err == nil {
			err = want.add(s)
		}
		if err != nil {
			return entry{}, err
		}
		e.selectors = append(e.selectors, s)
	}
	slices.SortFunc(e.selectors, func(a, b workload.Selector) int { return strings.Compare(a.String(), b.String()) })
	// Repetition must not make an entry win by count.
	e.selectors = slices.Compact(e.selectors)
	return e, nil
}

// EntryResult is one registration entry held against one workload.
type EntryResult struct {
	ID        spiffeid.ID         `json:"id"`
	Selectors []workload.Selector `json:"selectors"`
	// Missing are those that the workload does not have; none means a match.
	Missing []workload.Selector `json:"missing,omitempty"`
}

// match finds the entry with the most selectors among those that match. It
// returns false when there is none, and [workload.ErrAmbiguous] when two with
// different IDs have equally many.
func match(entries []entry, has []workload.Selector) (spiffeid.ID, bool, error) {
	var best, rival *entry
	for i := range entries {
		e := &entries[i]
		switch {
		case best != nil && len(e.selectors) < len(best.selectors), len(missing(e, has)) > 0:
		case best == nil || len(e.selectors) > len(best.selectors):
			best, rival = e, nil
		case e.id != best.id:
			rival = e
		}
	}
	if rival != nil {
		return spiffeid.ID{}, false, fmt.Errorf("entries %s and %s both match with %d selectors: %w",
			best.id, rival.id, len(best.selectors), workload.ErrAmbiguous)
	}
	if best == nil {
		return spiffeid.ID{}, false, nil
	}
	return best.id, true, nil
}

func missing(e *entry, has []workload.Selector) []workload.Selector {
	var out []workload.Selector
	for _, s := range e.selectors {
		if !slices.Contains(has, s) {
			out = append(out, s)
		}
	}
	return out
}
