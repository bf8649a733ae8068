package agent_test

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/agent"
	"ringfence.dev/agent/capture"
	"ringfence.dev/policy/authz"
)

// check parses and checks; an empty want means success.
func check(t *testing.T, text, want string) agent.Settings {
	t.Helper()
	c, err := agent.ParseConfig([]byte(text))
	var s agent.Settings
	if err == nil {
		s, err = c.Check()
	}
	switch {
	case want == "" && err != nil:
		t.Fatalf("refused: %v\n%s", err, text)
	case want != "" && err == nil:
		t.Fatalf("accepted, want %q\n%s", want, text)
	case want != "" && !strings.Contains(err.Error(), want):
		t.Fatalf("error %q does not say %q\n%s", err, want, text)
	}
	return s
}

// A plain host is watched and nothing else: whoever starts the agent without
// settings must not find the host changed.
func TestDefaultSettingsOnlyWatch(t *testing.T) {
	for _, text := range []string{"", "# nothing but a comment\n", "---\n", "scopes:\n"} {
		s := check(t, text, "")
		if len(s.Scopes) != 1 || !s.Scopes[0].Host || s.Scopes[0].Mode != authz.Watch || !s.DefaultScopes || !s.OnlyWatches() {
			t.Errorf("%q: scopes %+v", text, s.Scopes)
		}
		if s.Scopes[0].Loopback != capture.LoopbackObserve || s.Scopes[0].OnAgentDown != capture.DownClosed {
			t.Errorf("%q: scope %+v", text, s.Scopes[0])
		}
	}
	s := check(t, "host: h", "")
	want := agent.Settings{
		Instance: "default", TrustDomain: s.TrustDomain, Host: "h", StateDir: "/var/lib/ringfence", Capture: "auto",
		Policies: "/etc/ringfence/policies", Scopes: s.Scopes, DefaultScopes: true, Pins: map[netip.Addr]spiffeid.ID{},
		AdminSocket: "/run/ringfence/agent.sock", MetricsListen: "127.0.0.1:15020", ReadinessListen: "127.0.0.1:15021",
		DecisionLog: "/var/log/ringfence/decisions.jsonl", DecisionLogMax: 64 << 20, SVIDTTL: time.Hour, MaxHeadBytes: 64 << 10,
		DrainTimeout: 20 * time.Second, Threads: s.Threads, LogLevel: slog.LevelInfo,
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("defaults:\n got %+v\nwant %+v", s, want)
	}
	if s.TrustDomain.Name() != "ringfence.internal" || s.Threads < 1 {
		t.Errorf("trust domain %s, %d threads", s.TrustDomain, s.Threads)
	}
}

func TestNoScopesAtAll(t *testing.T) {
	if s := check(t, "scopes: []", ""); len(s.Scopes) != 0 || s.DefaultScopes {
		t.Errorf("an empty list is not the default: %+v", s.Scopes)
	}
}

const everyKey = `
instance: edge-1
trust_domain: example.org
host: node-7
state_dir: /srv/rf
capture: iptables
policies: /srv/policies
entries:
  - id: spiffe://example.org/web
    selectors: ["systemd:id:nginx.service", "unix:uid:33"]
unit_roots: [/rf/units]
scopes:
  - {name: h, host: true, mode: enforce, loopback: enforce, units: ["web-*.service"], except_units: [ssh.service], cgroups: ["/app/*"], on_agent_down: open}
  - {name: ns, netns: /run/netns//x, mode: dry-run, loopback: ignore}
  - {name: p, pid: 42}
mesh_networks: [10.1.2.3/8, "2001:db8::1/32"]
pins: {10.0.0.1: "spiffe://example.org/a", "2001:db8::2": "spiffe://example.org/b"}
admin: {socket: /run/x.sock}
metrics: {listen: "[::1]:9000"}
readiness: {listen: "off"}
decision_log: {path: "off", max_bytes: 65536, require: true}
svid: {ttl: 90s}
http: {max_head_bytes: 4096, encoded_slash_services: ["spiffe://example.org/web"]}
drain_timeout: -1s
threads: 3
log_level: debug
`

func TestEveryKey(t *testing.T) {
	s := check(t, everyKey, "")
	got := []any{s.Instance, s.TrustDomain.Name(), s.TrustDomainGiven, s.Host, s.StateDir, s.Capture, s.Policies,
		s.Entries[0].ID.String(), s.Entries[0].Selectors[1].String(), s.UnitRoots[0], s.MeshNetworks[0].String(), s.MeshNetworks[1].String(),
		s.Pins[netip.MustParseAddr("2001:db8::2")].String(), s.AdminSocket, s.MetricsListen, s.ReadinessListen, s.DecisionLog,
		s.DecisionLogMax, s.RequireLog, s.SVIDTTL, s.MaxHeadBytes, s.EncodedSlash[0].String(), s.DrainTimeout, s.Threads, s.LogLevel}
	want := []any{"edge-1", "example.org", true, "node-7", "/srv/rf", "iptables", "/srv/policies",
		"spiffe://example.org/web", "unix:uid:33", "/rf/units", "10.0.0.0/8", "2001:db8::/32",
		"spiffe://example.org/b", "/run/x.sock", "[::1]:9000", "", "",
		int64(65536), true, 90 * time.Second, 4096, "spiffe://example.org/web", time.Duration(0), 3, slog.LevelDebug}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("settings:\n got %v\nwant %v", got, want)
	}
	scopes := []agent.ScopeSettings{
		{Name: "h", Host: true, Mode: authz.Enforce, Loopback: "enforce", OnAgentDown: "open",
			Units: []string{"web-*.service"}, ExceptUnits: []string{"ssh.service"}, Cgroups: []string{"/app/*"}},
		{Name: "ns", Path: "/run/netns/x", Mode: authz.DryRun, Loopback: "ignore", OnAgentDown: "closed"},
		{Name: "p", Path: "/proc/42/ns/net", Mode: authz.Watch, Loopback: "observe", OnAgentDown: "closed"},
	}
	if !reflect.DeepEqual(s.Scopes, scopes) {
		t.Errorf("scopes:\n got %+v\nwant %+v", s.Scopes, scopes)
	}
	if s.OnlyWatches() {
		t.Error("two scopes do more than watch")
	}
}

// Every key of the file is in everyKey, so that a new one cannot come untested.
func TestEveryKeyIsThere(t *testing.T) {
	var walk func(typ reflect.Type)
	walk = func(typ reflect.Type) {
		for typ.Kind() == reflect.Slice || typ.Kind() == reflect.Map {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct {
			return
		}
		for i := range typ.NumField() {
			f := typ.Field(i)
			if key := f.Tag.Get("yaml"); !strings.Contains(everyKey, key+":") {
				t.Errorf("%s: key %q is not in the example", typ, key)
			}
			walk(f.Type)
		}
	}
	walk(reflect.TypeFor[agent.Config]())
}

func TestRefusedSettings(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		// Unknown, repeated, and not YAML at all.
		{"trust_domian: a", `line 1: unknown key "trust_domian"`},
		{"scopes:\n - name: a\n   host: true\n   moed: enforce", `line 4: unknown key "moed"`},
		{"admin:\n  socket: /a\n  sockets: /b", `line 3: unknown key "sockets"`},
		{"host: a\nhost: b", `line 2: key "host" is there twice, first in line 1`},
		{"scopes:\n- {name: a, host: true, mode: watch, mode: enforce}", `key "mode" is there twice`},
		{"host: a\n---\nhost: b", "more than one YAML document"},
		{"host: a\n---\n\t:", "yaml"},
		{"host: [a", "yaml"},
		{"\x00", "yaml"},
		{"- host", "where a set of keys is wanted"},
		{"host: [a, b]", "where text is wanted"},
		{"threads: many", "line 1: !!str `many` where a whole number is wanted"},
		{"unit_roots: /a", "where a list is wanted"},
		{"decision_log: {require: maybe}", "where true or false is wanted"},
		{"drain_timeout: 20", `"20" is no duration`},
		{"drain_timeout: [1s]", "a duration is text"},
		{"a: &a [*a]", "unknown key"},

		// Values.
		{"instance: Default", "instance:"},
		{"instance: ../x", "instance:"},
		{"instance: " + strings.Repeat("x", 33), "instance:"},
		{"trust_domain: spiffe://a/b", "trust_domain:"},
		{"trust_domain: UPPER", "trust_domain:"},
		{"host: a/b", "host:"},
		{"host: ..", "host:"},
		{"host: ä", "host:"},
		{"capture: xdp", `capture: "xdp" is none of auto, ebpf, iptables, observe`},
		{"state_dir: state", "state_dir:"},
		{"policies: ./p", "policies:"},
		{"policies: \"/a\\0b\"", "policies:"},
		{"admin: {socket: agent.sock}", "admin.socket:"},
		{"admin: {socket: /" + strings.Repeat("s", 107) + "}", "107 bytes"},
		{"unit_roots: [units]", "unit_roots:"},
		{"metrics: {listen: localhost}", "metrics.listen:"},
		{"metrics: {listen: \"127.0.0.1:\"}", "metrics.listen:"},
		{"metrics: {listen: \"127.0.0.1:http\"}", "no number"},
		{"metrics: {listen: \"127.0.0.1:70000\"}", "no number"},
		{"metrics: {listen: \"127.0.0.1:15008\"}", "for captured traffic"},
		{"readiness: {listen: \":15001\"}", "for captured traffic"},
		{"metrics: {listen: \"127.0.0.1:15021\"}", "readiness.listen: 127.0.0.1:15021 is metrics.listen too"},
		{"decision_log: {path: log}", "decision_log.path:"},
		{"decision_log: {max_bytes: 1}", "decision_log.max_bytes: 1 is not between"},
		{"decision_log: {max_bytes: -1}", "decision_log.max_bytes:"},
		{"svid: {ttl: 25h}", "svid.ttl:"},
		{"svid: {ttl: -1h}", "svid.ttl:"},
		{"http: {max_head_bytes: 100}", "http.max_head_bytes:"},
		{"http: {max_head_bytes: 2000000}", "http.max_head_bytes:"},
		{"http: {encoded_slash_services: [web]}", "http.encoded_slash_services:"},
		{"threads: -1", "threads:"},
		{"threads: 100000", "threads:"},
		{"log_level: loud", "log_level:"},
		{"mesh_networks: [10.0.0.0]", "mesh_networks:"},
		{"mesh_networks: [\"::ffff:10.0.0.0/104\"]", "write an IPv4 network as such"},
		{"pins: {host-a: \"spiffe://a.b/c\"}", "pins:"},
		{"pins: {10.0.0.1: nginx}", "pins:"},
		{"pins: {\"fe80::1%eth0\": \"spiffe://a.b/c\"}", "zone"},
		{"pins: {10.0.0.1: \"spiffe://a.b/c\", \"::ffff:10.0.0.1\": \"spiffe://a.b/d\"}", "10.0.0.1 is pinned twice"},
		{"entries: [{id: \"spiffe://a.b/c\"}]", "entries[0]: no selectors"},
		{"entries: [{id: \"spiffe://a.b\", selectors: [\"unix:uid:0\"]}]", "no path"},
		{"entries: [{id: web, selectors: [\"unix:uid:0\"]}]", "entries[0]:"},
		{"entries: [{id: \"spiffe://a.b/c\", selectors: [uid]}]", "type:value"},
		{"trust_domain: x.y\nentries: [{id: \"spiffe://a.b/c\", selectors: [\"unix:uid:0\"]}]", "not in the trust domain x.y"},

		// Scopes, and what contradicts.
		{"scopes: [{host: true}]", "scopes[0]: name"},
		{"scopes: [{name: \"a b\", host: true}]", "name"},
		{"scopes: [{name: a/b, host: true}]", "name"},
		{"scopes: [{name: .., host: true}]", "name"},
		{"scopes: [{name: a}]", "exactly one of host, netns, pid"},
		{"scopes: [{name: a, host: true, netns: /run/netns/a}]", "exactly one of"},
		{"scopes: [{name: a, netns: /x, pid: 3}]", "exactly one of"},
		{"scopes: [{name: a, pid: -3}]", "negative"},
		{"scopes: [{name: a, netns: web}]", "absolute"},
		{"scopes: [{name: a, host: true, mode: observe}]", "observe"},
		{"scopes: [{name: a, host: true, loopback: capture}]", "loopback"},
		{"scopes: [{name: a, host: true, on_agent_down: maybe}]", "maybe"},
		{"scopes: [{name: a, netns: /x, units: [a.service]}]", "for a host scope"},
		{"scopes: [{name: a, host: true, units: [\"[\"]}]", "malformed"},
		{"scopes: [{name: a, host: true, cgroups: [\"\"]}]", "malformed"},
		{"scopes: [{name: a, host: true}, {name: a, netns: /x}]", `scopes[1]: name "a" is used twice`},
		{"scopes: [{name: a, host: true}, {name: b, host: true}]", `scopes[1]: scope "a" already covers`},
		{"scopes: [{name: a, netns: /x/y}, {name: b, netns: /x//y}]", `scopes[1]: scope "a" already covers`},
		{"capture: observe\nscopes: [{name: a, host: true, mode: enforce}]", "mode enforce cannot be had with capture: observe"},
	} {
		check(t, c.text, c.want)
	}
}

// All that is wrong is told at once, by key.
func TestAllMistakesAtOnce(t *testing.T) {
	c, err := agent.ParseConfig([]byte("instance: A\ncapture: xdp\nscopes: [{name: a}]"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Check()
	for _, want := range []string{"instance:", "capture:", "scopes[0]:"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not speak of %s", err, want)
		}
	}
}

// The file that is installed is the default, spelled out.
func TestInstalledSettings(t *testing.T) {
	c, err := agent.LoadConfig("../deploy/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Check()
	if err != nil || !s.OnlyWatches() {
		t.Errorf("%+v: %v", s.Scopes, err)
	}
}

func TestLoadConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.yaml")
	if _, err := agent.LoadConfig(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte("hots: a"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := agent.LoadConfig(path); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), `"hots"`) {
		t.Errorf("error %v names neither file nor key", err)
	}
	if _, err := agent.LoadConfig(filepath.Dir(path)); err == nil {
		t.Error("a directory is no settings file")
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(everyKey))
	f.Add([]byte("scopes: [{name: a, host: true, mode: enforce}]"))
	f.Add([]byte("a: &a [*a, *a]\n---\n"))
	f.Add([]byte("pins: {? [a] : b}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := agent.ParseConfig(data)
		if err != nil {
			return
		}
		s, err := c.Check()
		if err != nil {
			return
		}
		if s.Threads < 1 || s.DrainTimeout < 0 || s.MaxHeadBytes < 1<<10 || !filepath.IsAbs(s.StateDir) || s.TrustDomain.IsZero() || s.Host == "" {
			t.Errorf("accepted: %+v", s)
		}
		names := map[string]bool{}
		for _, sc := range s.Scopes {
			if names[sc.Name] || sc.Host == (sc.Path != "") {
				t.Errorf("accepted scopes: %+v", s.Scopes)
			}
			names[sc.Name] = true
		}
	})
}
