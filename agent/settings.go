package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
)

// Settings are checked settings: the only form the rest of the agent sees.
type Settings struct {
	Instance    string
	TrustDomain spiffeid.TrustDomain
	// TrustDomainGiven tells a name the operator chose from the default.
	TrustDomainGiven bool
	Host             string
	StateDir         string
	Capture          string
	Policies         string
	Entries          []Entry
	UnitRoots        []string
	Scopes           []ScopeSettings
	// DefaultScopes tells that the settings name no scopes and the default one is used.
	DefaultScopes bool
	MeshNetworks  []netip.Prefix // empty: the directly connected ones
	Pins          map[netip.Addr]spiffeid.ID

	AdminSocket     string
	MetricsListen   string // "" for off
	ReadinessListen string // "" for off
	DecisionLog     string // "" for memory only
	DecisionLogMax  int64
	RequireLog      bool
	SVIDTTL         time.Duration
	MaxHeadBytes    int
	EncodedSlash    []spiffeid.ID
	DrainTimeout    time.Duration
	Threads         int
	LogLevel        slog.Level
}

// OnlyWatches reports whether no scope is in another mode than watch.
func (s Settings) OnlyWatches() bool {
	return !slices.ContainsFunc(s.Scopes, func(sc ScopeSettings) bool { return sc.Mode != authz.Watch })
}

// Entry is a checked registration entry.
type Entry struct {
	ID        spiffeid.ID
	Selectors []workload.Selector
}

// ScopeSettings is a checked scope.
type ScopeSettings struct {
	Name        string
	Host        bool
	Path        string // of the network namespace; empty for the host's
	Mode        authz.Mode
	Loopback    capture.Loopback
	OnAgentDown capture.OnAgentDown
	Cgroups     []string
	Units       []string
	ExceptUnits []string
}

var (
	instancePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,31}$`)
	namePattern     = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)
	errOneOf        = errors.New("name exactly one of host, netns, pid")
)

// maxUnixPath is the longest path a unix socket address holds, its final NUL excluded.
const maxUnixPath = 107

// Check turns raw settings into checked ones, with every default filled in. All
// that is wrong is reported at once.
func (c Config) Check() (Settings, error) {
	s := Settings{
		Instance:         or(c.Instance, "default"),
		TrustDomainGiven: c.TrustDomain != "",
		StateDir:         or(c.StateDir, "/var/lib/ringfence"),
		Capture:          or(c.Capture, "auto"),
		Policies:         or(c.Policies, "/etc/ringfence/policies"),
		AdminSocket:      or(c.Admin.Socket, "/run/ringfence/agent.sock"),
		MetricsListen:    or(c.Metrics.Listen, "127.0.0.1:15020"),
		ReadinessListen:  or(c.Readiness.Listen, "127.0.0.1:15021"),
		DecisionLog:      or(c.DecisionLog.Path, "/var/log/ringfence/decisions.jsonl"),
		DecisionLogMax:   or(c.DecisionLog.MaxBytes, 64<<20),
		RequireLog:       c.DecisionLog.Require,
		SVIDTTL:          or(time.Duration(c.SVID.TTL), time.Hour),
		MaxHeadBytes:     or(c.HTTP.MaxHeadBytes, 64<<10),
		DrainTimeout:     max(0, or(time.Duration(c.DrainTimeout), 20*time.Second)),
		Threads:          or(c.Threads, defaultThreads(runtime.NumCPU())),
		UnitRoots:        c.UnitRoots,
	}
	var errs []error
	bad := func(key string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	if !instancePattern.MatchString(s.Instance) {
		bad("instance", fmt.Errorf("%q is not 1 to 32 lower-case letters, digits, hyphens or underscores", s.Instance))
	}
	var err error
	s.TrustDomain, err = spiffeid.TrustDomainFromString(or(c.TrustDomain, "ringfence.internal"))
	if err == nil && s.TrustDomainGiven && s.TrustDomain.Name() != c.TrustDomain {
		err = fmt.Errorf("%q is not the bare name, %s", c.TrustDomain, s.TrustDomain.Name())
	}
	bad("trust_domain", err)
	s.Host, err = hostSegment(c.Host)
	bad("host", err)
	bad("capture", oneOf(s.Capture, "auto", "ebpf", "iptables", "observe"))
	bad("state_dir", absolute(s.StateDir))
	bad("policies", absolute(s.Policies))
	bad("admin.socket", absolute(s.AdminSocket))
	if len(s.AdminSocket) > maxUnixPath {
		bad("admin.socket", fmt.Errorf("longer than the %d bytes a unix socket path may have", maxUnixPath))
	}
	for _, root := range s.UnitRoots {
		bad("unit_roots", absolute(root))
	}
	s.MetricsListen, err = listenAddress(s.MetricsListen)
	bad("metrics.listen", err)
	s.ReadinessListen, err = listenAddress(s.ReadinessListen)
	bad("readiness.listen", err)
	if s.DecisionLog == "off" {
		s.DecisionLog = ""
	} else {
		bad("decision_log.path", absolute(s.DecisionLog))
	}
	bad("decision_log.max_bytes", within(s.DecisionLogMax, 64<<10, 1<<40))
	bad("svid.ttl", within(s.SVIDTTL, time.Second, 24*time.Hour))
	bad("http.max_head_bytes", within(s.MaxHeadBytes, 1<<10, 1<<20))
	bad("threads", within(s.Threads, 1, 1024))
	if c.LogLevel != "" {
		bad("log_level", s.LogLevel.UnmarshalText([]byte(c.LogLevel)))
	}
	if s.MetricsListen != "" && s.MetricsListen == s.ReadinessListen {
		bad("readiness.listen", fmt.Errorf("%s is metrics.listen too", s.ReadinessListen))
	}
	for _, id := range c.HTTP.EncodedSlashServices {
		parsed, err := spiffeid.FromString(id)
		bad("http.encoded_slash_services", err)
		s.EncodedSlash = append(s.EncodedSlash, parsed)
	}
	for _, text := range c.MeshNetworks {
		p, err := network4or6(text)
		bad("mesh_networks", err)
		s.MeshNetworks = append(s.MeshNetworks, p)
	}
	s.Pins, err = c.pins()
	bad("pins", err)
	for i, e := range c.Entries {
		entry, err := e.check()
		if err == nil && s.TrustDomainGiven && entry.ID.TrustDomain() != s.TrustDomain {
			err = fmt.Errorf("id %s is not in the trust domain %s", entry.ID, s.TrustDomain)
		}
		bad(fmt.Sprintf("entries[%d]", i), err)
		s.Entries = append(s.Entries, entry)
	}
	c.checkScopes(&s, bad)
	return s, errors.Join(errs...)
}

// pins maps addresses to IDs. IPv4 addresses written as IPv6 are the same
// addresses, so that two IDs for one address are found.
func (c Config) pins() (map[netip.Addr]spiffeid.ID, error) {
	pins := map[netip.Addr]spiffeid.ID{}
	var errs []error
	for addr, id := range c.Pins {
		a, err := netip.ParseAddr(addr)
		parsed, idErr := spiffeid.FromString(id)
		switch a = a.Unmap(); {
		case err != nil || idErr != nil:
			errs = append(errs, err, idErr)
		case a.Zone() != "":
			errs = append(errs, fmt.Errorf("%s: an address with a zone cannot be pinned", addr))
		case !pins[a].IsZero():
			errs = append(errs, fmt.Errorf("%s is pinned twice", a))
		default:
			pins[a] = parsed
		}
	}
	return pins, errors.Join(errs...)
}

func (c Config) checkScopes(s *Settings, bad func(string, error)) {
	if c.Scopes == nil {
		c.Scopes, s.DefaultScopes = []ScopeConfig{{Name: "host", Host: true}}, true
	}
	names, places := map[string]bool{}, map[string]string{}
	for i, sc := range c.Scopes {
		key := fmt.Sprintf("scopes[%d]", i)
		scope, err := sc.Check()
		bad(key, err)
		if names[sc.Name] {
			bad(key, fmt.Errorf("name %q is used twice", sc.Name))
		}
		if other, taken := places[scope.Path]; taken && err == nil {
			bad(key, fmt.Errorf("scope %q already covers that network namespace", other))
		}
		if s.Capture == "observe" && scope.Mode != authz.Watch {
			bad(key, fmt.Errorf("mode %s cannot be had with capture: observe, which only watches", scope.Mode))
		}
		names[sc.Name], places[scope.Path] = true, sc.Name
		s.Scopes = append(s.Scopes, scope)
	}
}

// network4or6 reads a prefix. One of IPv4 addresses written as IPv6 would never match.
func network4or6(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err == nil && p.Addr().Is4In6() {
		err = fmt.Errorf("%s: write an IPv4 network as such", text)
	}
	return p.Masked(), err
}

// Check checks one scope, from the settings file or from the admin socket.
func (c ScopeConfig) Check() (ScopeSettings, error) {
	s := ScopeSettings{
		Name: c.Name, Host: c.Host, Path: c.NetNS,
		Loopback:    capture.Loopback(or(c.Loopback, string(capture.LoopbackObserve))),
		OnAgentDown: capture.OnAgentDown(or(c.OnAgentDown, string(capture.DownClosed))),
		Cgroups:     c.Cgroups, Units: c.Units, ExceptUnits: c.ExceptUnits,
	}
	var errs []error
	if !namePattern.MatchString(c.Name) {
		errs = append(errs, fmt.Errorf("name %q is not 1 to 63 letters, digits, dots, hyphens or underscores", c.Name))
	}
	given := 0
	for _, is := range []bool{c.Host, c.NetNS != "", c.PID != 0} {
		if is {
			given++
		}
	}
	switch {
	case given != 1:
		errs = append(errs, errOneOf)
	case c.PID < 0:
		errs = append(errs, fmt.Errorf("pid %d is negative", c.PID))
	case c.PID != 0:
		s.Path = fmt.Sprintf("/proc/%d/ns/net", c.PID)
	case c.NetNS != "":
		s.Path = filepath.Clean(c.NetNS)
		errs = append(errs, absolute(c.NetNS))
	}
	if !c.Host && len(c.Cgroups)+len(c.Units)+len(c.ExceptUnits) > 0 {
		errs = append(errs, errors.New("cgroups, units and except_units are for a host scope: a namespace scope covers all in it"))
	}
	for _, p := range append(append(append([]string{}, c.Cgroups...), c.Units...), c.ExceptUnits...) {
		if _, err := path.Match(p, ""); err != nil || p == "" {
			errs = append(errs, fmt.Errorf("pattern %q is malformed", p))
		}
	}
	for key, err := range map[string]error{
		"mode":          s.Mode.UnmarshalText([]byte(or(c.Mode, "watch"))),
		"loopback":      oneOf(string(s.Loopback), "enforce", "observe", "ignore"),
		"on_agent_down": oneOf(string(s.OnAgentDown), "closed", "open"),
	} {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	return s, errors.Join(errs...)
}

func (c EntryConfig) check() (Entry, error) {
	id, err := spiffeid.FromString(c.ID)
	if err != nil {
		return Entry{}, err
	}
	if id.Path() == "" {
		return Entry{}, fmt.Errorf("id %s has no path", id)
	}
	if len(c.Selectors) == 0 {
		return Entry{}, errors.New("no selectors: the entry would match every workload")
	}
	e := Entry{ID: id}
	for _, text := range c.Selectors {
		sel, err := workload.ParseSelector(text)
		if err != nil {
			return Entry{}, err
		}
		e.Selectors = append(e.Selectors, sel)
	}
	return e, nil
}

// defaultThreads is the measured best for a relay: what one thread gathers
// leaves in one write, so that more threads cost more than they bring until
// there is work for several.
func defaultThreads(cpus int) int { return max(1, cpus/4) }

// hostSegment makes the node's name a SPIFFE path segment; empty means this machine's host name.
func hostSegment(name string) (string, error) {
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return "", err
		}
		name, _, _ = strings.Cut(strings.ToLower(name), ".")
	}
	return name, spiffeid.ValidatePathSegment(name)
}

// listenAddress checks host:port, where the port is a number other than those
// that every scope needs; "off" becomes empty.
func listenAddress(listen string) (string, error) {
	if listen == "off" {
		return "", nil
	}
	_, text, err := net.SplitHostPort(listen)
	if err != nil {
		return listen, err
	}
	port, err := strconv.ParseUint(text, 10, 16)
	switch {
	case err != nil:
		return listen, fmt.Errorf("%q: the port is no number up to 65535", listen)
	case agentPort(uint16(port)):
		return listen, fmt.Errorf("%q: ports %d, %d and %d are for captured traffic", listen, capture.OutboundPort, capture.InboundPort, capture.TunnelPort)
	}
	return listen, nil
}

func absolute(p string) error {
	if !filepath.IsAbs(p) || strings.ContainsRune(p, 0) {
		return fmt.Errorf("%q is not an absolute path", p)
	}
	return nil
}

func oneOf(v string, allowed ...string) error {
	for _, a := range allowed {
		if v == a {
			return nil
		}
	}
	return fmt.Errorf("%q is none of %s", v, strings.Join(allowed, ", "))
}

func within[T int | int64 | time.Duration](v, lo, hi T) error {
	if v < lo || v > hi {
		return fmt.Errorf("%v is not between %v and %v", v, lo, hi)
	}
	return nil
}

// or returns v, or def where v is the zero value.
func or[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}
