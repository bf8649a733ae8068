// Package workload holds the words of attestation that several floors share:
// a process image, the evidence about it, selectors, and the identity that
// follows. Values only: nothing here reads /proc or the kernel.
//
// The invariant to keep in mind: a pid alone names nobody. A process image is
// a thread group with its start time and its exec count, and evidence about one
// image says nothing of the next one under the same pid.
package workload

import (
	"errors"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	// ErrUnknown reports that no registration entry or template gives a workload an identity.
	ErrUnknown = errors.New("workload: no registration entry matches")
	// ErrGone reports that the process ended, or became another image, before its evidence was complete.
	ErrGone = errors.New("workload: process is gone or has changed")
	// ErrAmbiguous reports evidence that names more than one identity, such as a port with two owners.
	ErrAmbiguous = errors.New("workload: evidence names more than one identity")
)

// tick is the granularity of start times in /proc: USER_HZ is 100 on every
// architecture that Go supports.
const tick = 10_000_000

// Process is one process image. The zero value means unknown.
type Process struct {
	// PID is the thread group id in the initial pid namespace.
	PID uint32 `json:"pid"`
	// StartTime is in nanoseconds since boot, suspend included. Kernel hooks
	// give all of it, /proc rounds it down to 10 ms.
	StartTime uint64 `json:"start_time"`
	// ExecID counts the execve calls since the thread group's first fork. Zero
	// where the kernel has no BTF or the evidence did not come from a hook.
	ExecID uint64 `json:"exec_id,omitempty"`
}

// Same reports whether p and q are the same process image, allowing for the
// 10 ms granularity of /proc start times. Exec ids are compared only when both
// are known.
func (p Process) Same(q Process) bool {
	if p.PID != q.PID || p.StartTime/tick != q.StartTime/tick {
		return false
	}
	return p.ExecID == 0 || q.ExecID == 0 || p.ExecID == q.ExecID
}

// Source says where evidence came from, strongest first.
type Source uint8

const (
	SourceUnknown  Source = iota
	SourceHook            // the connect hook, in the caller's own context
	SourceListener        // the holder of a listening socket, found by inode
	SourceSockDiag        // socket tables and /proc, after the fact: the weaker kind
)

func (s Source) String() string {
	switch s {
	case SourceHook:
		return "hook"
	case SourceListener:
		return "listener"
	case SourceSockDiag:
		return "sock_diag"
	default:
		return "unknown"
	}
}

// MarshalText writes the source's name.
func (s Source) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Evidence is what a connection itself tells about its caller. UID and
// CgroupID always belong to the connection, never to a cache.
type Evidence struct {
	Process
	UID      uint32 `json:"uid"`
	GID      uint32 `json:"gid"`
	CgroupID uint64 `json:"cgroup_id,omitempty"` // inode number of the cgroup v2 directory; zero unknown
	Source   Source `json:"source"`
}

// Selector is one attested property in SPIRE's syntax, such as unix:uid:33.
type Selector struct {
	Type  string // "unix", "systemd"
	Value string // "uid:33", "id:nginx.service"
}

func (s Selector) String() string { return s.Type + ":" + s.Value }

// MarshalText writes the selector as type:value.
func (s Selector) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// ParseSelector reads type:value; both parts must be present.
func ParseSelector(text string) (Selector, error) {
	typ, value, ok := strings.Cut(text, ":")
	if !ok || typ == "" || value == "" {
		return Selector{}, errors.New("selector " + text + " is not of the form type:value")
	}
	return Selector{Type: typ, Value: value}, nil
}

// Identity is who a workload is, with the facts that proved it.
type Identity struct {
	// ID is the SPIFFE ID; zero means the workload has none.
	ID spiffeid.ID `json:"id"`
	// Name is the workload's short name for people: its unit without suffix, or its executable's base name.
	Name string `json:"name"`
	// Unit is the systemd unit, empty outside of units.
	Unit string `json:"unit,omitempty"`
	// Exe is the executable's path as the kernel gives it.
	Exe string `json:"exe,omitempty"`
	// Evidence is what the identity rests on.
	Evidence  Evidence   `json:"evidence"`
	Selectors []Selector `json:"selectors,omitempty"`
}
