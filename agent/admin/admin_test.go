package admin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy/authz"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake answers with what the test sets, and notes what it was asked.
type fake struct {
	ready error
	fail  error
	calls []string
}

func (f *fake) note(format string, args ...any) error {
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	return f.fail
}
func (f *fake) Status(context.Context) admin.Status {
	return admin.Status{Version: "1", Host: "a&b", PID: 7}
}
func (f *fake) Ready() error { return f.ready }
func (f *fake) AddScope(_ context.Context, raw json.RawMessage) error {
	return f.note("add %s", raw)
}
func (f *fake) RemoveScope(_ context.Context, name string) error { return f.note("remove %q", name) }
func (f *fake) SetMode(_ context.Context, name string, m authz.Mode) error {
	return f.note("mode %q %s", name, m)
}
func (f *fake) ReloadPolicy(context.Context) error { return f.note("reload") }
func (f *fake) Decisions(q admin.Filter) (any, error) {
	return []string{}, f.note("decisions %+v", q)
}
func (f *fake) Explain(q admin.Filter) (any, error) { return []string{}, f.note("explain %+v", q) }
func (f *fake) ClearPeer(addr string) error         { return f.note("clear %q", addr) }
func (f *fake) Check(_ context.Context, scope, peer string) (any, error) {
	return admin.CheckReport{OK: true}, f.note("check %q %q", scope, peer)
}
func (f *fake) Collect() admin.Resources { return admin.Resources{Descriptors: 5} }

// serve runs the interface on a socket until the test ends.
func serve(t *testing.T, f *fake) (*admin.Client, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "agent.sock")
	ln, err := admin.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: admin.Handler(f)}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	return admin.NewClient(path), path
}

func TestSocketIsPrivate(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	_, path := serve(t, &fake{})
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", p, st.Mode(), err)
		}
	}
	if now := syscall.Umask(0); now != 0 {
		t.Errorf("the umask was left at %o", now)
	}
}

// The umask belongs to the whole process: nothing that others make meanwhile may
// come out different.
func TestListenLeavesTheUmaskAlone(t *testing.T) {
	dir := t.TempDir()
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			p := filepath.Join(dir, fmt.Sprint("d", n))
			if err := os.Mkdir(p, 0o700); err != nil {
				done <- err
				return
			}
			if st, err := os.Stat(p); err != nil || st.Mode().Perm() != 0o700 {
				done <- fmt.Errorf("a directory came out as %v, %v", st.Mode(), err)
				return
			}
			os.Remove(p)
		}
	}()
	for range 300 {
		ln, err := admin.Listen(filepath.Join(dir, "s"))
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	old.Close() // as after kill -9
	ln, err := admin.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("closed, and yet there: %v", err)
	}
}

func TestLiveSocketIsRefused(t *testing.T) {
	c, path := serve(t, &fake{})
	if _, err := admin.Listen(path); err == nil || !strings.Contains(err.Error(), "another agent answers") {
		t.Errorf("%v", err)
	}
	if err := c.Get(t.Context(), "/v1/status", nil, nil); err != nil {
		t.Errorf("the first agent no longer answers: %v", err)
	}
}

// What is no socket is not ours to remove, wherever a settings file points.
func TestOtherFilesAreLeftAlone(t *testing.T) {
	dir := t.TempDir()
	file, link, sub := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "sub")
	if err := errors.Join(os.WriteFile(file, []byte("precious"), 0o600), os.Symlink(file, link), os.Mkdir(sub, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{file, link, sub} {
		if _, err := admin.Listen(p); err == nil || !strings.Contains(err.Error(), "something else is there") {
			t.Errorf("%s: %v", p, err)
		}
	}
	if data, err := os.ReadFile(link); err != nil || string(data) != "precious" {
		t.Errorf("%q, %v", data, err)
	}
}

// Of agents that start at the same time on a stale socket, one gets it.
func TestListenersRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	var mu sync.Mutex
	var won []net.Listener
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if ln, err := admin.Listen(path); err == nil {
				mu.Lock()
				defer mu.Unlock()
				won = append(won, ln)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d listeners on one path", len(won))
	}
	for _, ln := range won {
		ln.Close()
	}
}

func TestListenPathTooLong(t *testing.T) {
	if _, err := admin.Listen(filepath.Join(t.TempDir(), strings.Repeat("s", 108))); err == nil {
		t.Error("a path that a unix socket cannot have")
	}
}

func TestRequests(t *testing.T) {
	f := &fake{}
	c, _ := serve(t, f)
	path := func(segments ...string) string {
		t.Helper()
		p, err := admin.Path(segments...)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	do := func(method, path string, body any) {
		t.Helper()
		if err := c.Do(t.Context(), method, path, nil, body, nil); err != nil {
			t.Errorf("%s %s: %v", method, path, err)
		}
	}
	do("POST", "/v1/scopes", map[string]string{"name": "web"})
	do("DELETE", path("v1", "scopes", "a/b ../c%2f"), nil)
	do("PUT", path("v1", "scopes", "web", "mode", "dry-run"), nil)
	do("POST", "/v1/policy/reload", nil)
	do("DELETE", path("v1", "peers", "2001:db8::1"), nil)
	do("GET", "/v1/decisions?limit=7&effect=deny&unit=a", nil)
	do("GET", "/v1/explain?id=x", nil)
	do("GET", "/v1/check?peer=b&scope=web", nil)
	want := []string{`add {"name":"web"}`, `remove "a/b ../c%2f"`, `mode "web" dry-run`, "reload", `clear "2001:db8::1"`,
		"decisions {ID: Unit:a Scope: Effect:deny Limit:7}", "explain {ID:x Unit: Scope: Effect: Limit:100}", `check "web" "b"`}
	if got := strings.Join(f.calls, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("asked:\n%s", got)
	}
	var s admin.Status
	if err := c.Get(t.Context(), "/v1/status", nil, &s); err != nil || s.Host != "a&b" || s.PID != 7 {
		t.Errorf("%+v, %v", s, err)
	}
	var r admin.Resources
	if err := c.Do(t.Context(), "POST", "/v1/memory/collect", nil, nil, &r); err != nil || r.Descriptors != 5 {
		t.Errorf("%+v, %v", r, err)
	}
}

// status is the HTTP status of a raw request, with the body's error text.
func status(t *testing.T, socket, method, target string, body io.Reader) (int, string) {
	t.Helper()
	hc := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://agent"+target, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var e admin.Error
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &e); err != nil {
		return resp.StatusCode, string(data)
	}
	return resp.StatusCode, e.Error
}

func TestBadRequests(t *testing.T) {
	f := &fake{}
	_, path := serve(t, f)
	for _, c := range []struct {
		method, target, body string
		code                 int
		text                 string
	}{
		{"POST", "/v1/scopes", "", 400, "read scope"},
		{"POST", "/v1/scopes", "{", 400, "read scope"},
		{"POST", "/v1/scopes", `{"name":"a"} trailing`, 400, "read scope"},
		{"POST", "/v1/scopes", `{"name":"` + strings.Repeat("a", 100_000) + `"}`, 400, "too large"},
		{"PUT", "/v1/scopes/web/mode/audit", "", 400, "audit"},
		{"GET", "/v1/decisions?limit=x", "", 400, "limit"},
		{"GET", "/v1/decisions?limit=-1", "", 400, "limit"},
		{"GET", "/v1/explain?limit=0", "", 400, "limit"},
		{"GET", "/v1/nothing", "", 404, ""},
		{"DELETE", "/v1/status", "", 405, ""},
		{"POST", "/v1/status", "", 405, ""},
		{"DELETE", "/v1/scopes/", "", 404, ""},
	} {
		code, text := status(t, path, c.method, c.target, strings.NewReader(c.body))
		if code != c.code || !strings.Contains(text, c.text) {
			t.Errorf("%s %s: %d %q", c.method, c.target, code, text)
		}
	}
	if len(f.calls) != 0 {
		t.Errorf("the agent was asked: %v", f.calls)
	}
}

func TestErrorsKeepTheirKind(t *testing.T) {
	f := &fake{}
	_, path := serve(t, f)
	for err, want := range map[error]int{
		fmt.Errorf("scope x: %w", admin.ErrNotFound):                             404,
		admin.BadRequest{Err: errors.New("no such mode")}:                        400,
		fmt.Errorf("while: %w", admin.BadRequest{Err: errors.New("wrapped")}):    400,
		errors.New("the kernel would not"):                                       500,
		errors.Join(errors.New("a"), fmt.Errorf("scope: %w", admin.ErrNotFound)): 404,
	} {
		f.fail = err
		for _, target := range []string{"/v1/decisions", "/v1/explain", "/v1/check"} {
			if code, text := status(t, path, "GET", target, nil); code != want || text != err.Error() {
				t.Errorf("%s with %v: %d %q", target, err, code, text)
			}
		}
		if code, text := status(t, path, "DELETE", "/v1/scopes/x", nil); code != want || text != err.Error() {
			t.Errorf("%v: %d %q", err, code, text)
		}
	}
}

func TestReadiness(t *testing.T) {
	f := &fake{ready: errors.New("starting")}
	_, path := serve(t, f)
	if code, text := status(t, path, "GET", "/readyz", nil); code != 503 || text != "starting" {
		t.Errorf("%d %q", code, text)
	}
	f.ready = nil
	if code, _ := status(t, path, "GET", "/readyz", nil); code != 200 {
		t.Errorf("%d", code)
	}
}

func TestProfilesAreAtHand(t *testing.T) {
	_, path := serve(t, &fake{})
	if code, text := status(t, path, "GET", "/debug/pprof/goroutine?debug=1", nil); code != 200 || !strings.Contains(text, "goroutine profile") {
		t.Errorf("%d", code)
	}
}

func TestClientSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	gone := admin.NewClient(filepath.Join(dir, "none.sock"))
	if err := gone.Get(t.Context(), "/v1/status", nil, nil); !errors.Is(err, admin.ErrNotRunning) || !strings.Contains(err.Error(), "ringfence agent") {
		t.Errorf("no socket: %v", err)
	}
	stale := filepath.Join(dir, "stale.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	if err := admin.NewClient(stale).Get(t.Context(), "/v1/status", nil, nil); !errors.Is(err, admin.ErrNotRunning) {
		t.Errorf("stale socket: %v", err)
	}
}

// answering serves one fixed answer to every request.
func answering(t *testing.T, code int, header http.Header, body []byte) *admin.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for k, v := range header {
			w.Header()[k] = v
		}
		w.WriteHeader(code)
		w.Write(body)
	})}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	return admin.NewClient(path)
}

func TestClientReadsAnswers(t *testing.T) {
	var s admin.Status
	if err := answering(t, 200, nil, []byte(`<html>`)).Get(t.Context(), "/v1/status", nil, &s); err == nil || !strings.Contains(err.Error(), "another version") {
		t.Errorf("not JSON: %v", err)
	}
	if err := answering(t, 500, nil, []byte(`{"error":"broken"}`)).Get(t.Context(), "/v1/status", nil, &s); err == nil || err.Error() != "broken" {
		t.Errorf("an error: %v", err)
	}
	if err := answering(t, 502, nil, []byte(`?`)).Get(t.Context(), "/v1/status", nil, &s); err == nil || !strings.Contains(err.Error(), "502") {
		t.Errorf("an error without text: %v", err)
	}
	// A redirect is no success, whatever is behind it.
	to := http.Header{"Location": {"/v1/status"}}
	if err := answering(t, 307, to, nil).Do(t.Context(), "DELETE", "/v1/scopes/x", nil, nil, nil); err == nil {
		t.Error("a redirect was followed")
	}
	newer := []byte(`{"version":"9","of_a_later_version":[1,2,3]}`)
	if err := answering(t, 200, nil, newer).Get(t.Context(), "/v1/status", nil, &s); err != nil || s.Version != "9" {
		t.Errorf("a field that came later: %+v, %v", s, err)
	}
}

func TestPath(t *testing.T) {
	for _, bad := range []string{"", ".", ".."} {
		if p, err := admin.Path("v1", bad); err == nil {
			t.Errorf("%q became %s", bad, p)
		}
	}
	if p, err := admin.Path("v1", "a b/c?d#e%"); err != nil || p != "/v1/a%20b%2Fc%3Fd%23e%25" {
		t.Errorf("%s, %v", p, err)
	}
}

// The shape is public: what was there keeps its name.
func TestStatusShape(t *testing.T) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("", " ")
	full := admin.Status{Scopes: []admin.Scope{{Uncovered: []admin.Uncovered{{}}}}, Workloads: []admin.Workload{{}}, Connections: []admin.Connection{{}},
		Peers: []admin.Peer{{}}, Observations: []admin.Observation{{}}, Counters: map[string]int64{}}
	if err := enc.Encode(full); err != nil {
		t.Fatal(err)
	}
	for _, key := range strings.Fields(`version instance pid started host trust_domain capture capture_reason ready problems scopes
		netns_cookie mode loopback protected uncovered socket_cookie workloads listening connections decision side carrier protocol
		bytes_from_client bytes_from_server requests decisions permit deny would_deny policy peers agent tunnels streams observations
		observations_forgotten counters resources descriptors descriptor_limit goroutines threads rss_bytes heap_bytes tables`) {
		if !strings.Contains(b.String(), `"`+key+`"`) {
			t.Errorf("the key %q is gone", key)
		}
	}
}
