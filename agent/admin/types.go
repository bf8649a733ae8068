// Package admin is the agent's control interface: HTTP with JSON over a unix
// socket that only root can open. The command reads the agent through it
// and through nothing else.
//
// The shapes here are the public contract. A field may be added; none changes
// its meaning.
package admin

import (
	"time"

	"ringfence.dev/agent/capture"
	"ringfence.dev/policy/authz"
)

// Status is everything the agent knows about itself, at one moment.
type Status struct {
	Version     string    `json:"version"`
	Instance    string    `json:"instance"`
	PID         int       `json:"pid"`
	Started     time.Time `json:"started"`
	Host        string    `json:"host"`
	TrustDomain string    `json:"trust_domain"`
	// Capture is the back end in use, CaptureReason why it is that one.
	Capture       string `json:"capture"`
	CaptureReason string `json:"capture_reason"`
	Ready         bool   `json:"ready"`
	// Problems are sentences that say what is wrong and what to do about it.
	Problems     []string      `json:"problems"`
	Scopes       []Scope       `json:"scopes"`
	Workloads    []Workload    `json:"workloads"`
	Connections  []Connection  `json:"connections"`
	Decisions    Decisions     `json:"decisions"`
	Policy       Policy        `json:"policy"`
	Peers        []Peer        `json:"peers"`
	Observations []Observation `json:"observations"`
	// ObservationsForgotten counts pairs dropped because the table was full.
	ObservationsForgotten uint64           `json:"observations_forgotten"`
	Counters              map[string]int64 `json:"counters"`
	Resources             Resources        `json:"resources"`
}

// Scope is one protected network namespace.
type Scope struct {
	Name     string           `json:"name"`
	Path     string           `json:"path,omitempty"` // empty for the host's own namespace
	Host     bool             `json:"host"`
	Cookie   uint64           `json:"netns_cookie"`
	Mode     authz.Mode       `json:"mode"`
	Loopback capture.Loopback `json:"loopback"`
	// Protected is true only when the kernel was read back and everything in the
	// scope is captured. It is false in watch mode.
	Protected bool `json:"protected"`
	// Problems say why the scope is not, or not fully, protected.
	Problems []string `json:"problems"`
	// Limits are what the capture back end cannot do for the scope even when all is well.
	Limits []string `json:"limits,omitempty"`
	// Uncovered are connections that were open before the scope was added.
	Uncovered []Uncovered `json:"uncovered"`
}

// Uncovered is a connection that capture cannot touch.
type Uncovered struct {
	Local   string `json:"local"`
	Remote  string `json:"remote"`
	Process string `json:"process,omitempty"`
	PID     uint32 `json:"pid,omitempty"`
	Reason  string `json:"reason"`
	Cookie  uint64 `json:"socket_cookie"`
}

// Workload is a program that listens in a scope.
type Workload struct {
	Scope     string   `json:"scope"`
	Name      string   `json:"name"`
	ID        string   `json:"id,omitempty"`
	Unit      string   `json:"unit,omitempty"`
	Exe       string   `json:"exe,omitempty"`
	PID       uint32   `json:"pid,omitempty"`
	Listening []string `json:"listening"`
	Problem   string   `json:"problem,omitempty"`
	// SVIDExpires is when its certificate ends, if it has one.
	SVIDExpires *time.Time `json:"svid_expires,omitempty"`
}

// Connection is one live relayed connection.
type Connection struct {
	Decision    string    `json:"decision"`
	Scope       string    `json:"scope"`
	Side        string    `json:"side"`
	Carrier     string    `json:"carrier"` // tunnel, plain or local
	Protocol    string    `json:"protocol"`
	Source      string    `json:"source"`
	SourceID    string    `json:"source_id,omitempty"`
	Destination string    `json:"destination"`
	DestID      string    `json:"destination_id,omitempty"`
	Opened      time.Time `json:"opened"`
	BytesIn     uint64    `json:"bytes_from_client"`
	BytesOut    uint64    `json:"bytes_from_server"`
	Requests    uint64    `json:"requests"`
}

// Decisions counts decisions since the agent started.
type Decisions struct {
	Permit    uint64 `json:"permit"`
	Deny      uint64 `json:"deny"`
	WouldDeny uint64 `json:"would_deny"`
}

// Policy is the policy set in force.
type Policy struct {
	Dir     string    `json:"dir"`
	Version string    `json:"version"` // hash of the set
	Count   int       `json:"count"`
	Loaded  time.Time `json:"loaded"`
	// Error is why the newest files were not loaded, while the last good set stays in force.
	Error string `json:"error,omitempty"`
}

// Peer is what is known of the agent at an address.
type Peer struct {
	Scope string `json:"scope"`
	Addr  string `json:"addr"`
	// Agent is "yes", "no" or "unknown".
	Agent string `json:"agent"`
	// ID is the SPIFFE ID shown last, Group whose workloads the address may show.
	ID      string `json:"id,omitempty"`
	Group   string `json:"group,omitempty"`
	Pin     string `json:"pin,omitempty"`
	Tunnels int    `json:"tunnels"`
	Streams int    `json:"streams"`
}

// Observation is one pair of workload and peer, with how often it was seen.
type Observation struct {
	Scope     string    `json:"scope"`
	Direction string    `json:"direction"`
	Workload  string    `json:"workload"`
	ID        string    `json:"id,omitempty"`
	Unit      string    `json:"unit,omitempty"`
	Exe       string    `json:"exe,omitempty"`
	Peer      string    `json:"peer"`
	Count     uint64    `json:"count"`
	First     time.Time `json:"first"`
	Last      time.Time `json:"last"`
	Note      string    `json:"note,omitempty"`
}

// Resources is what the agent uses.
type Resources struct {
	Descriptors     int             `json:"descriptors"`
	DescriptorLimit uint64          `json:"descriptor_limit"`
	Goroutines      int             `json:"goroutines"`
	Threads         int             `json:"threads"`
	RSSBytes        uint64          `json:"rss_bytes"`
	HeapBytes       uint64          `json:"heap_bytes"`
	Connections     int             `json:"connections"`
	Tunnels         int             `json:"tunnels"`
	Streams         int             `json:"streams"`
	Tables          []capture.Table `json:"tables"`
}

// Error is the body of every answer that is not a success.
type Error struct {
	Error string `json:"error"`
}

// CheckReport is the walk along the path to a peer. OK is that of the last step.
type CheckReport struct {
	Scope string      `json:"scope"`
	Peer  string      `json:"peer"`
	OK    bool        `json:"ok"`
	Steps []CheckStep `json:"steps"`
}

// CheckStep is one step of the walk. Fix says what to do, when it failed.
type CheckStep struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"`
}
