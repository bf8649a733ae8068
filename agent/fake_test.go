package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

// fakeBackend is a strict back end without a kernel: it fails the test when it is
// told of a scope twice, or of one that is not there.
type fakeBackend struct {
	t testing.TB

	mu       sync.Mutex
	scopes   map[string]capture.Scope
	cgroups  map[string][]capture.Cgroup
	calls    []string
	problems []string         // what Verify answers
	fail     map[string]error // by call, such as "add web" or "mode web"
	verified int
	closed   []bool // how it was closed
}

var _ capture.Backend = (*fakeBackend)(nil)

func newFake(t testing.TB) *fakeBackend {
	return &fakeBackend{t: t, scopes: map[string]capture.Scope{}, cgroups: map[string][]capture.Cgroup{}, fail: map[string]error{}}
}

func (b *fakeBackend) call(verb, scope string) error {
	b.calls = append(b.calls, verb+" "+scope)
	return b.fail[verb+" "+scope]
}

func (b *fakeBackend) Name() string { return "fake" }

func (b *fakeBackend) Add(_ context.Context, s capture.Scope) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.call("add", s.Name+" "+s.Mode.String()); err != nil {
		return err
	}
	if _, twice := b.scopes[s.Name]; twice {
		b.t.Errorf("scope %s added twice", s.Name)
	}
	b.scopes[s.Name], b.cgroups[s.Name] = s, s.Cgroups
	return nil
}

func (b *fakeBackend) SetMode(_ context.Context, s capture.Scope) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, there := b.scopes[s.Name]; !there {
		b.t.Errorf("mode of %s set, which is not there", s.Name)
	}
	if err := b.call("mode", s.Name+" "+s.Mode.String()); err != nil {
		return err
	}
	b.scopes[s.Name] = s
	return nil
}

func (b *fakeBackend) SetCgroups(scope string, table []capture.Cgroup) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, there := b.scopes[scope]; !there {
		b.t.Errorf("cgroups of %s set, which is not there", scope)
	}
	b.cgroups[scope] = table
	return b.fail["cgroups "+scope]
}

func (b *fakeBackend) Remove(_ context.Context, scope string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.call("remove", scope); err != nil {
		return err
	}
	delete(b.scopes, scope)
	return nil
}

func (b *fakeBackend) Verify(string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.verified++
	return slices.Clone(b.problems)
}

func (b *fakeBackend) Close(detach bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = append(b.closed, detach)
	return nil
}

func (b *fakeBackend) Run(ctx context.Context, _ func(capture.Event)) error {
	<-ctx.Done()
	return nil
}

func (b *fakeBackend) Origin(string, flow.Direction, int, netip.AddrPort, netip.AddrPort) (flow.Flow, error) {
	return flow.Flow{}, capture.ErrNoOrigin
}

func (b *fakeBackend) BeforeConnect(string, int, netip.AddrPort, netip.AddrPort, flow.Flow) error {
	return nil
}
func (b *fakeBackend) Refused(string, flow.Flow, workload.Identity) {}
func (b *fakeBackend) PolicyChanged()                               {}
func (b *fakeBackend) Tables() []capture.Table {
	return []capture.Table{{Name: "fake", Entries: 1, Max: 2}}
}

// scope returns what the back end was told of a scope.
func (b *fakeBackend) scope(name string) (capture.Scope, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, ok := b.scopes[name]
	return s, ok
}

func (b *fakeBackend) table(name string) map[string]bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	covered := map[string]bool{}
	for _, c := range b.cgroups[name] {
		covered[c.Path] = c.Covered
	}
	return covered
}

// settingsIn are sound settings that keep everything below dir.
func settingsIn(t testing.TB, dir, more string) Settings {
	t.Helper()
	c, err := ParseConfig([]byte(fmt.Sprintf(`
instance: %s
host: node
trust_domain: test.example
state_dir: %s/state
policies: %[2]s/policies
admin: {socket: %[2]s/agent.sock}
metrics: {listen: "off"}
readiness: {listen: "off"}
decision_log: {path: "off"}
drain_timeout: 1s
%s`, instanceOf(dir), dir, more)))
	if err == nil {
		var s Settings
		if s, err = c.Check(); err == nil {
			return s
		}
	}
	t.Fatal(err)
	return Settings{}
}

// instanceOf is a name that no other test has: directories of tests are unique.
func instanceOf(dir string) string {
	sum := uint32(2166136261)
	for _, c := range dir {
		sum = (sum ^ uint32(c)) * 16777619
	}
	return fmt.Sprintf("t%08x", sum)
}

// living is an agent as Run has it after open, with a fake back end and without
// its servers. Scopes are closed with the test.
func living(t testing.TB, s Settings) (*Agent, *fakeBackend) {
	t.Helper()
	nettest.RequireRoot(t)
	b := newFake(t)
	a := New(s, "test", slog.New(slog.DiscardHandler))
	ctx, end := context.WithCancel(context.Background())
	a.life, a.backend, a.backendReason = ctx, b, "a test"
	var closers stack
	err := errors.Join(a.openIdentity(&closers), a.openPolicy(&closers))
	if err == nil {
		err = a.openRelay()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		end()
		a.closeScopes()
		a.relay.Drain(ctx)
		a.svids.Close()
		closers.close(a.log)
	})
	return a, b
}

// dir is a directory for a test, with a path short enough for sockets.
func dir(t testing.TB) string {
	t.Helper()
	return filepath.Clean(t.TempDir())
}

var discard = slog.New(slog.DiscardHandler)
