package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/bpf"
	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

// running is an agent in Run.
type running struct {
	*Agent
	t      *testing.T
	client *admin.Client
	log    *syncBuffer
	cancel context.CancelFunc
	done   chan error
}

// start runs an agent until the test ends, and waits until it is ready.
func start(t *testing.T, s Settings) *running {
	t.Helper()
	r := launch(t, s)
	nettest.Wait(t, "the agent to be ready", func() bool {
		select {
		case err := <-r.done:
			r.done <- err
			t.Fatalf("the agent ended: %v\n%s", err, r.log)
		default:
		}
		return r.Ready() == nil
	})
	return r
}

func launch(t *testing.T, s Settings) *running {
	t.Helper()
	nettest.RequireRoot(t)
	ctx, cancel := context.WithCancel(context.Background())
	log := &syncBuffer{}
	r := &running{
		Agent: New(s, "test", slog.New(slog.NewTextHandler(log, nil))), t: t, log: log,
		client: admin.NewClient(s.AdminSocket), cancel: cancel, done: make(chan error, 1),
	}
	go func() { r.done <- r.Run(ctx) }()
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("the agent ended with: %v", err)
		}
		if err := Cleanup(context.Background(), s); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return r
}

// stop ends the agent and returns what Run did, once.
func (r *running) stop() error {
	r.cancel()
	select {
	case err := <-r.done:
		r.done <- nil
		return err
	case <-time.After(30 * time.Second):
		r.t.Fatalf("the agent does not end\n%s", r.log)
		return nil
	}
}

func (r *running) status() admin.Status {
	r.t.Helper()
	var s admin.Status
	if err := r.client.Get(r.t.Context(), "/v1/status", nil, &s); err != nil {
		r.t.Fatal(err)
	}
	return s
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// traces is what an agent may leave: descriptors, pins, cgroup and socket.
type traces struct {
	descriptors              int
	pinned, cgroup, listened bool
	home                     string
}

func tracesOf(t *testing.T, s Settings) traces {
	t.Helper()
	there := func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	}
	home, err := ownCgroup()
	if err != nil {
		t.Fatal(err)
	}
	return traces{
		descriptors: fds(t), home: home,
		pinned:   there(filepath.Join(bpf.DefaultPinRoot, s.Instance)),
		cgroup:   there(filepath.Join(nettest.CgroupRoot(t), leafName(s.Instance))),
		listened: there(s.AdminSocket),
	}
}

// leavesNothing holds what is there now to what was there before.
func leavesNothing(t *testing.T, s Settings, before traces) {
	t.Helper()
	nettest.Wait(t, "all descriptors closed", func() bool { return fds(t) <= before.descriptors })
	after := tracesOf(t, s)
	before.descriptors, after.descriptors = 0, 0
	if after != before {
		t.Errorf("left behind: %+v, before %+v", after, before)
	}
}

// warm opens what the process keeps for good: the way home from namespaces.
func warm(t *testing.T) { handleOf(t, nettest.NetNS(t, "warm")) }

var captures = []string{"observe", "ebpf", "iptables"}

func skipIptables(t *testing.T, kind, mode string) {
	t.Helper()
	if kind == "observe" && mode != "watch" {
		t.SkipNow()
	}
}

// From start to stop with each back end: the scope is there, the pages answer,
// and afterwards nothing is left, as long as nothing enforces.
func TestRun(t *testing.T) {
	for _, kind := range captures {
		for _, mode := range []string{"watch", "dry-run"} {
			t.Run(kind+" "+mode, func(t *testing.T) {
				skipIptables(t, kind, mode)
				warm(t)
				ns := nettest.NetNS(t, "run")
				s := settingsIn(t, dir(t), fmt.Sprintf("capture: %s\nscopes: [{name: web, netns: %s, mode: %s}]", kind, ns.Path, mode))
				before := tracesOf(t, s)
				r := start(t, s)
				st := r.status()
				if st.Capture != kind || len(st.Scopes) != 1 || st.Scopes[0].Mode.String() != mode || len(st.Problems) != 0 || !st.Ready {
					t.Errorf("%+v", st)
				}
				if err := r.client.Get(t.Context(), "/readyz", nil, nil); err != nil {
					t.Error(err)
				}
				if limits := strings.Join(st.Scopes[0].Limits, "\n"); kind == "iptables" && mode != "watch" && !strings.Contains(limits, "weaker evidence") {
					t.Errorf("iptables without its limits: %q", limits)
				} else if kind == "observe" && !strings.Contains(limits, "sampling") {
					t.Errorf("observe without its limits: %q", limits)
				}
				if _, counted := st.Counters["kernel_watched"]; counted != (kind == "ebpf") {
					t.Errorf("counters of the hooks: %v", st.Counters)
				}
				if err := r.stop(); err != nil {
					t.Errorf("%v\n%s", err, r.log)
				}
				leavesNothing(t, s, before)
				if out := ns.Exec(t, "ss", "-Hltn"); out != "" {
					t.Errorf("still listening:\n%s", out)
				}
			})
		}
	}
}

// Whatever stage the start fails at, it says why and leaves nothing.
func TestFailedStart(t *testing.T) {
	warm(t)
	ns := nettest.NetNS(t, "failstart")
	ns.Listen(t, "0.0.0.0:15008")
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, more string
		break_     func(t *testing.T, s Settings)
		want       string
	}{
		{"metrics address", "metrics: {listen: \"192.0.2.77:15020\"}", nil, "metrics.listen"},
		{"readiness address", "metrics: {listen: \"127.0.0.1:0\"}\nreadiness: {listen: \"192.0.2.77:15021\"}", nil, "readiness.listen"},
		{"admin socket", "admin: {socket: " + file + "}", nil, "something else is there"},
		{"state directory", "state_dir: " + file + "/x", nil, "state directory"},
		{"decision log", "decision_log: {path: " + file + "/x/y}", nil, "decision log"},
		{"policies", "policies: " + file, nil, "policies"},
		{"trust domain", "", func(t *testing.T, s Settings) {
			other := settingsIn(t, filepath.Dir(s.StateDir), "scopes: []")
			other.TrustDomain = mustDomain(t, "other.example")
			r := start(t, other)
			if err := r.stop(); err != nil {
				t.Fatal(err)
			}
		}, "certificate authority"},
		{"scopes file", "", func(t *testing.T, s Settings) {
			if err := errors.Join(os.MkdirAll(s.StateDir, 0o700), os.WriteFile(filepath.Join(s.StateDir, scopesFile), []byte(`[{"Nmae":"x"}]`), 0o600)); err != nil {
				t.Fatal(err)
			}
		}, `unknown field "Nmae"`},
		{"scope's namespace", "scopes: [{name: a, netns: /run/netns/surely-not-there}]", nil, "add scope a"},
		{"scope's port", "capture: ebpf\nscopes: [{name: a, netns: " + ns.Path + ", mode: enforce}]", nil, "port 15008 is taken"},
		{"scope's port with iptables", "capture: iptables\nscopes: [{name: a, netns: " + ns.Path + ", mode: enforce}]", nil, "port 15008 is taken"},
		{"the second scope", "capture: ebpf\nscopes: [{name: h, host: true, units: [surely-none.service]}, {name: a, netns: " + ns.Path + ", mode: enforce}]", nil, "port 15008 is taken"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := c.more
			s := settingsIn(t, dir(t), "")
			cfg, err := ParseConfig([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			overlay(&s, cfg, t)
			if c.break_ != nil {
				c.break_(t, s)
			}
			before := tracesOf(t, s)
			err = New(s, "test", discard).Run(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v does not say %q", err, c.want)
			}
			before.listened = before.listened && c.name == "admin socket"
			leavesNothing(t, s, before)
		})
	}
}

// overlay puts what cfg names over settings.
func overlay(s *Settings, cfg Config, t *testing.T) {
	t.Helper()
	if cfg.StateDir != "" {
		s.StateDir = cfg.StateDir
	}
	if cfg.Policies != "" {
		s.Policies = cfg.Policies
	}
	if cfg.Admin.Socket != "" {
		s.AdminSocket = cfg.Admin.Socket
	}
	s.MetricsListen, s.ReadinessListen = cfg.Metrics.Listen, cfg.Readiness.Listen
	if cfg.DecisionLog.Path != "" {
		s.DecisionLog = cfg.DecisionLog.Path
	}
	s.Capture = or(cfg.Capture, "observe")
	checked, err := Config{Scopes: cfg.Scopes}.Check()
	if err != nil {
		t.Fatal(err)
	}
	s.Scopes, s.DefaultScopes = checked.Scopes, checked.DefaultScopes
}

// A second agent of an instance ends before it has touched what the first has in
// the kernel, and so does a clean-up.
func TestSecondAgent(t *testing.T) {
	ns := nettest.NetNS(t, "second")
	s := settingsIn(t, dir(t), "capture: ebpf\nscopes: [{name: web, netns: "+ns.Path+", mode: enforce}]")
	r := start(t, s)
	other := s
	other.StateDir, other.AdminSocket = filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "s")
	if err := New(other, "test", discard).Run(t.Context()); !errors.Is(err, errRunning) || !strings.Contains(err.Error(), "instance") {
		t.Errorf("second agent: %v", err)
	}
	if err := Cleanup(t.Context(), s); !errors.Is(err, errRunning) {
		t.Errorf("clean-up beside a running agent: %v", err)
	}
	// Another instance on the same socket gets no further.
	other = s
	other.Instance += "b"
	if err := New(other, "test", discard).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another agent answers") {
		t.Errorf("another instance on the same socket: %v", err)
	}
	if st := r.status(); !st.Scopes[0].Protected {
		t.Errorf("the first agent's scope: %+v", st.Scopes[0])
	}
}

// What enforces goes on enforcing without its agent, also when the next one
// cannot start; a clean-up opens it.
func TestEnforcingOutlivesTheAgent(t *testing.T) {
	ns := nettest.NetNS(t, "outlive")
	accept(t, ns.Listen(t, "127.0.0.1:8080"))
	ns.Exec(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "lo")
	accept(t, ns.Listen(t, "192.0.2.1:8080"))
	s := settingsIn(t, dir(t), "capture: ebpf\nscopes: [{name: web, netns: "+ns.Path+", mode: enforce, loopback: enforce}]")
	dial := func() error {
		return ns.Do(func() error {
			c, err := net.DialTimeout("tcp", "192.0.2.1:8080", 3*time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	if err := dial(); err != nil {
		t.Fatal(err)
	}
	r := start(t, s)
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	refused := func(when string) {
		t.Helper()
		if err := dial(); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v", when, err)
		}
	}
	refused("without an agent")
	failing := s
	failing.AdminSocket = filepath.Dir(s.AdminSocket)
	if err := New(failing, "test", discard).Run(t.Context()); err == nil {
		t.Error("started")
	}
	failing = s
	failing.Scopes = append(failing.Scopes, ScopeSettings{Name: "gone", Path: "/run/netns/surely-not-there"})
	if err := New(failing, "test", discard).Run(t.Context()); err == nil {
		t.Error("started")
	}
	refused("after starts that failed")
	if err := Cleanup(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := dial(); err != nil {
		t.Errorf("after the clean-up: %v", err)
	}
	if err := Cleanup(t.Context(), s); err != nil {
		t.Errorf("twice: %v", err)
	}
}

// SIGHUP loads policies and trust anew, and a broken policy does not keep a new
// trust bundle out. Every certificate is on record.
func TestReload(t *testing.T) {
	s := settingsIn(t, dir(t), "capture: observe\nscopes: []")
	if err := os.MkdirAll(s.Policies, 0o755); err != nil {
		t.Fatal(err)
	}
	r := start(t, s)
	hup := func() {
		t.Helper()
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	policy := filepath.Join(s.Policies, "a.cedar")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(policy, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("permit(principal, action, resource);")
	hup()
	nettest.Wait(t, "the policy", func() bool { return r.status().Policy.Count == 1 })
	write("permit(principal, action")
	bundle, err := os.ReadFile(filepath.Join(s.StateDir, "ca", "bundle.json"))
	if err != nil {
		t.Fatal(err)
	}
	before := r.authority.Status().Sequence
	installRoot(t, filepath.Join(s.StateDir, "ca"))
	if after, _ := os.ReadFile(filepath.Join(s.StateDir, "ca", "bundle.json")); bytes.Equal(bundle, after) {
		t.Fatal("nothing was installed")
	}
	hup()
	nettest.Wait(t, "the new trust bundle", func() bool { return r.authority.Status().Sequence > before })
	nettest.Wait(t, "the broken policy to be told", func() bool { return r.status().Policy.Error != "" })
	if st := r.status(); st.Policy.Count != 1 || len(st.Problems) == 0 {
		t.Errorf("%+v, %q", st.Policy, st.Problems)
	}
	if _, err := r.svids.Certificate(t.Context(), r.nodeIdentity().ID); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.StateDir, "issued.jsonl")
	data, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(data), r.nodeIdentity().ID.String()) {
		t.Errorf("%v, issued:\n%s", err, data)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// The pages outside of the socket: both on loopback, ready only while running.
func TestEndpoints(t *testing.T) {
	s := settingsIn(t, dir(t), "capture: observe\nscopes: []")
	s.MetricsListen, s.ReadinessListen = freePort(t), freePort(t)
	r := start(t, s)
	for url, want := range map[string]string{"http://" + s.MetricsListen + "/metrics": "ringfence_policies 0", "http://" + s.ReadinessListen + "/": "ready"} {
		resp, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 || !strings.Contains(string(body), want) {
			t.Errorf("%s: %d, %v", url, resp.StatusCode, err)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", s.ReadinessListen); err == nil {
		t.Error("still ready")
	}
}

// Whoever takes a port of these pages while the agent is down must not keep it down.
func TestTakenEndpointIsServedLater(t *testing.T) {
	s := settingsIn(t, dir(t), "capture: observe\nscopes: []")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s.MetricsListen = taken.Addr().String()
	r := start(t, s)
	if p := r.Status(t.Context()).Problems; len(p) != 1 || !strings.Contains(p[0], "metrics.listen") {
		t.Errorf("problems %q", p)
	}
	taken.Close()
	nettest.Wait(t, "metrics to be served", func() bool {
		resp, err := http.Get("http://" + s.MetricsListen + "/metrics")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == 200
	})
	http.DefaultClient.CloseIdleConnections()
	if p := r.Status(t.Context()).Problems; len(p) > 0 {
		t.Errorf("problems %q", p)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// The default settings name no scope: the host is watched, its services are
// listed with whom they talk to, and nothing on it is changed.
func TestDefaultWatchesTheHost(t *testing.T) {
	for _, kind := range []string{"auto", "observe"} {
		t.Run(kind, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			accept(t, ln)
			s := settingsIn(t, dir(t), "capture: "+kind)
			if !s.DefaultScopes {
				t.Fatal("these are not the defaults")
			}
			r := start(t, s)
			st := r.status()
			if len(st.Scopes) != 1 || st.Scopes[0].Mode != authz.Watch || !st.Scopes[0].Host || st.Scopes[0].Protected || st.CaptureReason == "" {
				t.Errorf("%+v", st.Scopes)
			}
			if kind == "observe" && !strings.Contains(st.CaptureReason, "sampled") {
				t.Errorf("why observe: %q", st.CaptureReason)
			}
			sleeper := talker(t, ln.Addr().String())
			defer sleeper()
			nettest.Wait(t, "the service and its client", func() bool {
				st = r.status()
				listed := false
				for _, w := range st.Workloads {
					listed = listed || strings.Contains(strings.Join(w.Listening, " "), ln.Addr().String()) && w.ID != "" && w.Name != ""
				}
				for _, o := range st.Observations {
					if listed && o.Direction == "outbound" && o.Peer == ln.Addr().String() {
						return true
					}
				}
				return false
			})
		})
	}
}

// talker connects as another program than the agent does: in another cgroup.
func talker(t *testing.T, addr string) func() {
	t.Helper()
	dir, _ := nettest.Cgroup(t, "talker")
	cmd := commandIn(t, dir, "bash", "-c", "exec 3<>/dev/tcp/"+strings.Replace(addr, ":", "/", 1)+"; sleep 60")
	return func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
}
