package decisionlog

import (
	"encoding/json"
	"fmt"
)

// ParseRecord reads one line of a decision log.
func ParseRecord(text []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(text, &r); err != nil {
		return Record{}, fmt.Errorf("decision record: %w", err)
	}
	return r, nil
}
