package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// DefaultConfigPath is where the agent looks for its settings when none are named.
const DefaultConfigPath = "/etc/ringfence/agent.yaml"

// Config is the agent's settings file, in YAML. Every field is optional: the
// zero value means the default given with it. Unknown keys are refused.
type Config struct {
	// Instance tells several agents on one kernel apart: it names their pins and
	// cgroup leaf. Default "default".
	Instance string `yaml:"instance"`
	// TrustDomain is the SPIFFE trust domain, without scheme. Default: the one of
	// the CA under StateDir, else "ringfence.internal".
	TrustDomain string `yaml:"trust_domain"`
	// Host is this node's name in SPIFFE IDs (/ns/<host>/...). Default: the host name.
	Host string `yaml:"host"`
	// StateDir keeps the CA and what must survive a restart. Default /var/lib/ringfence.
	StateDir string `yaml:"state_dir"`
	// Capture is auto, ebpf, iptables or observe. Default auto: the best that the kernel can do.
	Capture string `yaml:"capture"`
	// Policies is the directory of *.cedar and *.json policies. Default
	// /etc/ringfence/policies; it need not exist.
	Policies string `yaml:"policies"`
	// Entries are registration entries: selectors that give a SPIFFE ID.
	Entries []EntryConfig `yaml:"entries"`
	// UnitRoots are cgroup paths whose direct children named *.service count as units,
	// besides systemd's own. Only for trees that nobody but root can write to.
	UnitRoots []string `yaml:"unit_roots"`
	// Scopes are what is protected. Default: the host itself, in watch mode.
	Scopes []ScopeConfig `yaml:"scopes"`
	// MeshNetworks are the networks, in CIDR form, whose hosts may have agents and are
	// asked. Default: the networks directly connected to each scope.
	MeshNetworks []string `yaml:"mesh_networks"`
	// Pins maps peer addresses to the SPIFFE ID that must be found there.
	Pins map[string]string `yaml:"pins"`

	Admin       AdminConfig       `yaml:"admin"`
	Metrics     ListenConfig      `yaml:"metrics"`   // default 127.0.0.1:15020
	Readiness   ListenConfig      `yaml:"readiness"` // default 127.0.0.1:15021
	DecisionLog DecisionLogConfig `yaml:"decision_log"`
	SVID        SVIDConfig        `yaml:"svid"`
	HTTP        HTTPConfig        `yaml:"http"`

	// DrainTimeout bounds how long live connections may finish after SIGTERM.
	// Default 20s; a negative value means do not wait.
	DrainTimeout Duration `yaml:"drain_timeout"`
	// Threads is how many operating system threads may run Go code at once. Default:
	// one up to four processors, a quarter of them beyond, because fewer batch better.
	Threads int `yaml:"threads"`
	// LogLevel is debug, info, warn or error. Default info.
	LogLevel string `yaml:"log_level"`
}

// EntryConfig is one registration entry. All selectors must match a workload.
type EntryConfig struct {
	ID        string   `yaml:"id"`
	Selectors []string `yaml:"selectors"`
}

// ScopeConfig is one scope. Exactly one of Host, NetNS and PID says which namespace.
type ScopeConfig struct {
	// Name is unique per agent: letters, digits, dot, hyphen, underscore; at most 63.
	Name string `yaml:"name" json:"name"`
	// Host selects the network namespace the agent itself runs in.
	Host bool `yaml:"host" json:"host,omitempty"`
	// NetNS is the path of a network namespace, such as /run/netns/web.
	NetNS string `yaml:"netns" json:"netns,omitempty"`
	// PID selects the network namespace of a running process.
	PID int `yaml:"pid" json:"pid,omitempty"`
	// Mode is watch, dry-run or enforce. Default watch.
	Mode string `yaml:"mode" json:"mode,omitempty"`
	// Loopback is enforce, observe or ignore. Default observe.
	Loopback string `yaml:"loopback" json:"loopback,omitempty"`
	// Cgroups are patterns of cgroup v2 paths that a host scope covers, with * for any
	// characters but a slash. Default: all.
	Cgroups []string `yaml:"cgroups" json:"cgroups,omitempty"`
	// Units are patterns of systemd units that a host scope covers. Default: all.
	Units []string `yaml:"units" json:"units,omitempty"`
	// ExceptUnits are patterns of systemd units that a host scope leaves alone.
	ExceptUnits []string `yaml:"except_units" json:"except_units,omitempty"`
	// OnAgentDown is closed or open: what an enforcing scope does while its agent is dead. Default closed.
	OnAgentDown string `yaml:"on_agent_down" json:"on_agent_down,omitempty"`
}

// AdminConfig is the admin socket.
type AdminConfig struct {
	// Socket is the path of the unix socket, made with mode 0600. Default /run/ringfence/agent.sock.
	Socket string `yaml:"socket"`
}

// ListenConfig is an HTTP endpoint: host:port, or "off".
type ListenConfig struct {
	Listen string `yaml:"listen"`
}

// DecisionLogConfig is the log of decisions, in JSON lines.
type DecisionLogConfig struct {
	// Path of the file. Default /var/log/ringfence/decisions.jsonl; "off" keeps only what explain needs, in memory.
	Path string `yaml:"path"`
	// MaxBytes is the size at which the file is rotated. Default 64 MiB.
	MaxBytes int64 `yaml:"max_bytes"`
	// Require refuses traffic of enforcing scopes while decisions cannot be recorded. Default false.
	Require bool `yaml:"require"`
}

// SVIDConfig is about the certificates of workloads.
type SVIDConfig struct {
	// TTL is the life of an X.509-SVID, from one second to a day. Default 1h.
	TTL Duration `yaml:"ttl"`
}

// HTTPConfig is about the HTTP filter.
type HTTPConfig struct {
	// MaxHeadBytes bounds a message head. Default 65536, at most 1048576.
	MaxHeadBytes int `yaml:"max_head_bytes"`
	// EncodedSlashServices are SPIFFE IDs of HTTP-only services at which %2F and %5C
	// pass as part of a path segment.
	EncodedSlashServices []string `yaml:"encoded_slash_services"`
}

// Duration is a time.Duration written as text, such as 20s.
type Duration time.Duration

// UnmarshalYAML reads text such as 1m30s.
func (d *Duration) UnmarshalYAML(node *yaml.Node) error {
	var text string
	if err := node.Decode(&text); err != nil {
		return fmt.Errorf("line %d: a duration is text such as 20s", node.Line)
	}
	v, err := time.ParseDuration(text)
	if err != nil {
		return fmt.Errorf("line %d: %q is no duration such as 20s or 1h30m", node.Line, text)
	}
	*d = Duration(v)
	return nil
}

// MarshalJSON writes the duration as text.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// LoadConfig reads a settings file. A file that does not exist is an error
// that matches [os.ErrNotExist].
func LoadConfig(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read settings: %w", err)
	}
	c, err := ParseConfig(data)
	if err != nil {
		return Config{}, fmt.Errorf("settings %s: %w", path, err)
	}
	return c, nil
}

// ParseConfig reads settings: one YAML document, unknown and repeated keys refused.
func ParseConfig(data []byte) (Config, error) {
	var c Config
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, plain(err)
	}
	switch err := dec.Decode(new(yaml.Node)); {
	case err == nil:
		return Config{}, errors.New("more than one YAML document")
	case !errors.Is(err, io.EOF):
		return Config{}, plain(err)
	}
	return c, nil
}

// The YAML package speaks of Go types, which are nothing to an operator.
var (
	unknownKey  = regexp.MustCompile(`^line (\d+): field (.*) not found in type \S+$`)
	repeatedKey = regexp.MustCompile(`^line (\d+): mapping key (.*) already defined at line (\d+)$`)
	wrongType   = regexp.MustCompile(`^line (\d+): cannot unmarshal (.*) into (\S+)$`)
)

func plain(err error) error {
	var typed *yaml.TypeError
	if !errors.As(err, &typed) {
		return err
	}
	var errs []error
	for _, text := range typed.Errors {
		text = unknownKey.ReplaceAllString(text, `line $1: unknown key "$2"`)
		text = repeatedKey.ReplaceAllString(text, `line $1: key $2 is there twice, first in line $3`)
		if m := wrongType.FindStringSubmatch(text); m != nil {
			text = fmt.Sprintf("line %s: %s where %s is wanted", m[1], m[2], wanted(m[3]))
		}
		errs = append(errs, errors.New(text))
	}
	return errors.Join(errs...)
}

// wanted puts a Go type in an operator's words.
func wanted(typ string) string {
	switch {
	case strings.HasPrefix(typ, "[]"):
		return "a list"
	case strings.HasPrefix(typ, "int"):
		return "a whole number"
	case typ == "bool":
		return "true or false"
	case typ == "string":
		return "text"
	default:
		return "a set of keys"
	}
}
