package ca

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

// Issuance is one line of the issuance log.
type Issuance struct {
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind"`   // "svid" or "intermediate"
	Serial   string    `json:"serial"` // hexadecimal, as openssl prints it without colons
	ID       string    `json:"id"`     // SPIFFE ID; of an intermediate, the trust domain's
	Node     string    `json:"node,omitempty"`
	NotAfter time.Time `json:"not_after"`
}

func issuance(kind, id, node string, cert *x509.Certificate, now time.Time) Issuance {
	return Issuance{
		Time: now.UTC(), Kind: kind, Serial: cert.SerialNumber.Text(16),
		ID: id, Node: node, NotAfter: cert.NotAfter.UTC(),
	}
}

// Log is an issuance log: JSON lines appended to a file. A line is in the
// kernel's hands, not necessarily on the disk, when Record returns.
type Log struct {
	mu sync.Mutex // held for one write, so that lines do not mix
	f  *os.File
}

// OpenLog opens or makes the log file, mode 0600. Its Record method is made for
// [Options.Record].
func OpenLog(path string) (*Log, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open issuance log: %w", err)
	}
	return &Log{f: f}, nil
}

// Record appends one line. After a failure, such as a full disk, a part of the
// line may be there; readers skip lines that do not parse.
func (l *Log) Record(i Issuance) error {
	line, err := json.Marshal(i)
	if err != nil {
		return fmt.Errorf("write issuance log: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := l.f.Write(append(line, '\n')); err != nil {
		// End the torn line, or the next one would be lost with it.
		l.f.Write([]byte{'\n'})
		return fmt.Errorf("write issuance log: %w", err)
	}
	return nil
}

// Close closes the file.
func (l *Log) Close() error { return l.f.Close() }

// LogName is the customary name of the issuance log in a state directory.
const LogName = "issued.jsonl"
