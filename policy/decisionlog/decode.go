package decisionlog

import (
	"encoding/json"
	"fmt"

	"ringfence.dev/policy/authz"
)

// line is a Record as it is written: an address that is not known is empty,
// which netip reads back as the zero value.
type line struct {
	Record
	Side string `json:"side"`
}

// ParseRecord reads one line of a decision log.
func ParseRecord(text []byte) (Record, error) {
	var l line
	if err := json.Unmarshal(text, &l); err != nil {
		return Record{}, fmt.Errorf("decision record: %w", err)
	}
	for _, side := range []authz.Side{authz.Egress, authz.Ingress, authz.Local} {
		if l.Side == side.String() {
			l.Record.Side = side
			return l.Record, nil
		}
	}
	return Record{}, fmt.Errorf("decision record: unknown side %q", l.Side)
}

// MarshalJSON writes the record as it stands in the log.
func (r Record) MarshalJSON() ([]byte, error) {
	b := appendRecord(nil, &r)
	return b[:len(b)-1], nil
}
