// Package lab makes two hosts on this machine: network namespaces joined by a
// virtual cable, each protected by an agent of its own, in one trust domain. A
// user tries policies and clients there before touching a real host; the demo,
// the end-to-end tests and the benchmark stand on it too.
//
// It is not a sandbox: programs run as root in the machine's own file system,
// and only their network and their cgroup are the lab's.
//
// The invariant: what exists is found by name (namespaces, cgroups) or by pid
// with start time (agents), never by memory of this process, so that Down works
// from another process, after a crash, and twice.
package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/policy/authz"
)

var (
	// ErrUp reports a lab, or the remains of one, where none was expected.
	ErrUp = errors.New("the lab is already up")
	// ErrDown reports that there is no lab of that name.
	ErrDown = errors.New("there is no lab: bring one up first")
)

// runDir holds the state of every lab. It is on a file system that a reboot
// empties, as it does namespaces and processes.
const runDir = "/run/ringfence"

// DefaultName is the lab that the command works on when none is named.
const DefaultName = "lab"

// Options says what Up makes. The zero value is the lab of the command line
// without flags.
type Options struct {
	// Name tells several labs apart: 1 to 20 lower-case letters, digits or inner
	// hyphens. Empty means [DefaultName].
	Name string `json:"name"`
	// Capture is auto, ebpf or iptables, or off for hosts without agents. Empty means auto.
	Capture string `json:"capture"`
	// Agents names the hosts that get an agent. Nil means both.
	Agents []string `json:"agents"`
	// Policies is a directory of policies. Empty means one that permits everything.
	Policies string `json:"policies,omitempty"`
	// Mode is watch, dry-run or enforce. Empty means enforce.
	Mode string `json:"mode"`
	// TrustDomain is the SPIFFE trust domain. Empty means lab.test.
	TrustDomain string `json:"trust_domain"`
	// Binary is the ringfence command that runs the agents. Empty means this very program.
	Binary string `json:"binary"`
}

// Lab is a lab that is up, or partly so.
type Lab struct {
	opts  Options
	state state
	// agents started by this process, by host; others are known by their pid file alone.
	agents map[string]*Agent
}

// state is what the lab remembers in its directory.
type state struct {
	Options Options `json:"options"`
	// MountedNetNS: Up made /run/netns a mount, as iproute2 does, so Down may undo it.
	MountedNetNS bool `json:"mounted_netns,omitempty"`
}

// host is one of the two hosts.
type host struct {
	name   string
	v4, v6 netip.Prefix
}

// The addresses are from the blocks for documentation (RFC 5737, RFC 3849), so
// that they mean nothing anywhere else.
var hosts = []host{
	{"a", netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")},
	{"b", netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")},
}

// Device is the name of each host's end of the cable.
const Device = "eth0"

// Address returns a host's IPv4 and IPv6 address; the zero values for another name than a or b.
func Address(name string) (v4, v6 netip.Addr) {
	for _, h := range hosts {
		if h.name == name {
			return h.v4.Addr(), h.v6.Addr()
		}
	}
	return netip.Addr{}, netip.Addr{}
}

func isHost(name string) error {
	if slices.ContainsFunc(hosts, func(h host) bool { return h.name == name }) {
		return nil
	}
	return fmt.Errorf("%q is no host of the lab: they are a and b", name)
}

var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$`)

// checked fills in defaults and reports everything that is wrong at once.
func (o Options) checked() (Options, error) {
	o.Name = or(o.Name, DefaultName)
	o.Capture = or(o.Capture, "auto")
	o.Mode = or(o.Mode, authz.Enforce.String())
	o.TrustDomain = or(o.TrustDomain, "lab.test")
	if o.Agents == nil {
		o.Agents = []string{"a", "b"}
	}
	var errs []error
	if !namePattern.MatchString(o.Name) {
		errs = append(errs, fmt.Errorf("name %q is not 1 to 20 lower-case letters, digits or inner hyphens", o.Name))
	}
	if !slices.Contains([]string{"auto", "ebpf", "iptables", "off"}, o.Capture) {
		errs = append(errs, fmt.Errorf("capture %q is none of auto, ebpf, iptables, off", o.Capture))
	}
	if len(o.Agents) != len(slices.Compact(slices.Sorted(slices.Values(o.Agents)))) {
		errs = append(errs, fmt.Errorf("agents %q: a host is named twice", o.Agents))
	}
	for _, h := range o.Agents {
		errs = append(errs, isHost(h))
	}
	var mode authz.Mode
	errs = append(errs, mode.UnmarshalText([]byte(o.Mode)))
	if _, err := spiffeid.TrustDomainFromString(o.TrustDomain); err != nil {
		errs = append(errs, fmt.Errorf("trust domain %q: %w", o.TrustDomain, err))
	}
	var err error
	if o.Policies, err = policyDir(o.Policies); err != nil {
		errs = append(errs, err)
	}
	if o.Binary == "" {
		o.Binary, err = os.Executable()
		errs = append(errs, err)
	}
	return o, errors.Join(errs...)
}

// policyDir makes the path absolute: agents do not share our working directory.
func policyDir(dir string) (string, error) {
	if dir == "" {
		return "", nil
	}
	st, err := os.Stat(dir)
	if err != nil {
		return "", fmt.Errorf("policies: %w", err)
	}
	if !st.IsDir() {
		return "", fmt.Errorf("policies: %s is not a directory", dir)
	}
	return filepath.Abs(dir)
}

// Open finds a lab that is up. It returns [ErrDown] when there is none.
func Open(name string) (*Lab, error) {
	name = or(name, DefaultName)
	if !namePattern.MatchString(name) {
		return nil, fmt.Errorf("%q is no name of a lab", name)
	}
	l := &Lab{opts: Options{Name: name}, agents: map[string]*Agent{}}
	data, err := os.ReadFile(l.path("lab.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrDown
	}
	if err != nil {
		return nil, fmt.Errorf("lab state: %w", err)
	}
	if err := json.Unmarshal(data, &l.state); err != nil {
		return nil, fmt.Errorf("lab state: %w", err)
	}
	l.opts = l.state.Options
	l.opts.Name = name
	return l, nil
}

func (l *Lab) save() error {
	l.state.Options = l.opts
	data, err := json.MarshalIndent(l.state, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(l.path("lab.json"), append(data, '\n'))
}

// Options returns what the lab was made with, defaults filled in.
func (l *Lab) Options() Options { return l.opts }

// Dir is the directory of the lab's state, mode 0700.
func (l *Lab) Dir() string { return l.path() }

func (l *Lab) path(elem ...string) string {
	return filepath.Join(append([]string{runDir, l.opts.Name}, elem...)...)
}

// NetNS is the path of a host's network namespace.
func (l *Lab) NetNS(host string) string { return filepath.Join(netnsDir, l.nsName(host)) }

func (l *Lab) nsName(host string) string { return "rf-" + l.opts.Name + "-" + host }

// UnitRoot is the cgroup v2 path below which a host's units live.
func (l *Lab) UnitRoot(host string) string { return "/rf-" + l.opts.Name + "/" + host }

// Socket is the path of the admin socket of a host's agent.
func (l *Lab) Socket(host string) string { return l.path(host, "admin.sock") }

// writeFile writes a file of the lab's, whole or not at all.
func writeFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func or(v, def string) string {
	if v == "" {
		return def
	}
	return v
}
