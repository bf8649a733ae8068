package agent

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

// scopesIn reads back what is remembered, as name:mode.
func scopesIn(t *testing.T, s Settings) string {
	t.Helper()
	saved, err := loadScopes(s.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, sc := range saved {
		out = append(out, sc.Name+":"+sc.Mode.String())
	}
	return strings.Join(out, " ")
}

// restart starts over with the same state, as a new process would.
func restart(t *testing.T, s Settings) (*Agent, *fakeBackend) {
	t.Helper()
	a, b := living(t, s)
	if _, err := a.addConfiguredScopes(t.Context()); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func live(a *Agent) string {
	var out []string
	for _, sc := range a.scopeList() {
		out = append(out, sc.settings.Name+":"+sc.settings.Mode.String())
	}
	return strings.Join(out, " ")
}

func TestScopesSurvive(t *testing.T) {
	s := settingsIn(t, dir(t), "scopes: []")
	web, db := nettest.NetNS(t, "web"), nettest.NetNS(t, "db")
	a, _ := restart(t, s)
	for _, c := range []ScopeConfig{{Name: "web", NetNS: web.Path, Mode: "enforce"}, {Name: "db", NetNS: db.Path}} {
		if err := addJSON(t, a, c); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.SetMode(t.Context(), "db", authz.DryRun); err != nil {
		t.Fatal(err)
	}
	if got := scopesIn(t, s); got != "db:dry-run web:enforce" {
		t.Errorf("remembered %q", got)
	}
	st, err := os.Stat(filepath.Join(s.StateDir, scopesFile))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	a.closeScopes()

	a, _ = restart(t, s)
	if got := live(a); got != "db:dry-run web:enforce" {
		t.Errorf("restored %q", got)
	}
	if err := a.RemoveScope(t.Context(), "db"); err != nil || scopesIn(t, s) != "web:enforce" {
		t.Errorf("%v, remembered %q", err, scopesIn(t, s))
	}
	if err := a.RemoveScope(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(s.StateDir, scopesFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no scope, and yet a file: %v", err)
	}
}

// The settings file wins over what was changed at run time.
func TestSettingsWin(t *testing.T) {
	ns := nettest.NetNS(t, "wins")
	s := settingsIn(t, dir(t), "scopes: [{name: web, netns: "+ns.Path+", mode: enforce}]")
	a, _ := restart(t, s)
	if err := a.SetMode(t.Context(), "web", authz.Watch); err != nil {
		t.Fatal(err)
	}
	a.closeScopes()
	a, _ = restart(t, s)
	if got := live(a); got != "web:enforce" {
		t.Errorf("restored %q", got)
	}
}

// What was made of the default scope stays, since no settings file says otherwise.
func TestDefaultScopeIsRemembered(t *testing.T) {
	s := settingsIn(t, dir(t), "")
	save := func(scopes ...savedScope) {
		t.Helper()
		if err := saveScopes(s.StateDir, scopes); err != nil {
			t.Fatal(err)
		}
	}
	changed := savedScope{ScopeSettings: s.Scopes[0]}
	changed.Units = []string{"no-such-*.service"}
	save(changed)
	a, _ := restart(t, s)
	if list := a.scopeList(); len(list) != 1 || len(list[0].settings.Units) != 1 {
		t.Errorf("%s", live(a))
	}
	a.closeScopes()
	save()
	a, _ = restart(t, s)
	if got := live(a); got != "host:watch" || scopesIn(t, s) != "" {
		t.Errorf("live %q, remembered %q", got, scopesIn(t, s))
	}
}

func TestGoneNamespaceIsForgotten(t *testing.T) {
	s := settingsIn(t, dir(t), "scopes: []")
	a, _ := restart(t, s)
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: nettest.NetNS(t, "stays").Path}); err != nil {
		t.Fatal(err)
	}
	a.closeScopes()
	saved, err := loadScopes(s.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	gone := savedScope{ScopeSettings: ScopeSettings{Name: "gone", Path: "/run/netns/surely-not-there", Loopback: "observe", OnAgentDown: "closed"}}
	if err := saveScopes(s.StateDir, append(saved, gone)); err != nil {
		t.Fatal(err)
	}
	a, _ = restart(t, s)
	if got := live(a); got != "web:watch" || scopesIn(t, s) != "web:watch" {
		t.Errorf("live %q, remembered %q", got, scopesIn(t, s))
	}
}

// A scope named by a process is that process's namespace, not that of whoever
// gets its number next.
func TestRecycledPIDIsNotProtected(t *testing.T) {
	s := settingsIn(t, dir(t), "scopes: []")
	ns, other := nettest.NetNS(t, "pid"), nettest.NetNS(t, "pidother")
	a, _ := restart(t, s)
	pid := sleeper(t, ns)
	if err := addJSON(t, a, ScopeConfig{Name: "web", PID: pid}); err != nil {
		t.Fatal(err)
	}
	a.closeScopes()
	a, _ = restart(t, s)
	if got := live(a); got != "web:watch" {
		t.Errorf("restored %q", got)
	}
	a.closeScopes()
	saved, err := loadScopes(s.StateDir)
	if err != nil || len(saved) != 1 || saved[0].Cookie == 0 || saved[0].Boot == "" {
		t.Fatalf("%+v, %v", saved, err)
	}
	// The same path, another namespace.
	saved[0].Path = "/proc/" + strconv.Itoa(sleeper(t, other)) + "/ns/net"
	if err := saveScopes(s.StateDir, saved); err != nil {
		t.Fatal(err)
	}
	a, _ = restart(t, s)
	if got := live(a); got != "" || scopesIn(t, s) != "" {
		t.Errorf("restored %q, remembered %q", got, scopesIn(t, s))
	}
	// The same cookie of another boot.
	saved[0].Path, saved[0].Boot = "/proc/"+strconv.Itoa(pid)+"/ns/net", "00000000-0000-0000-0000-000000000000"
	if err := saveScopes(s.StateDir, saved); err != nil {
		t.Fatal(err)
	}
	a, _ = restart(t, s)
	if got := live(a); got != "" {
		t.Errorf("restored %q", got)
	}
}

// One scope that cannot be had does not cost the others their protection. It is
// told, and stays remembered until it is restored or forgotten on purpose.
func TestMissingScope(t *testing.T) {
	s := settingsIn(t, dir(t), "scopes: []")
	web, db := nettest.NetNS(t, "miss"), nettest.NetNS(t, "missdb")
	a, _ := restart(t, s)
	for _, c := range []ScopeConfig{{Name: "db", NetNS: db.Path, Mode: "enforce"}, {Name: "web", NetNS: web.Path, Mode: "enforce"}} {
		if err := addJSON(t, a, c); err != nil {
			t.Fatal(err)
		}
	}
	a.closeScopes()
	taken := db.Listen(t, "0.0.0.0:15008")
	a, b := restart(t, s)
	problems := strings.Join(a.Status(t.Context()).Problems, "\n")
	if live(a) != "web:enforce" || !strings.Contains(problems, "scope db of the last run is not protected") || !strings.Contains(problems, "15008") {
		t.Errorf("live %q\n%s", live(a), problems)
	}
	// A change elsewhere does not make it forgotten.
	if err := a.SetMode(t.Context(), "web", authz.DryRun); err != nil || scopesIn(t, s) != "web:dry-run db:enforce" {
		t.Errorf("%v, remembered %q", err, scopesIn(t, s))
	}
	a.closeScopes()
	b.Close(false)
	taken.Close()
	a, _ = restart(t, s)
	if live(a) != "db:enforce web:dry-run" || len(a.Status(t.Context()).Problems) != 0 {
		t.Errorf("live %q, %q", live(a), a.Status(t.Context()).Problems)
	}
	a.closeScopes()
	db.Listen(t, "0.0.0.0:15008")
	a, _ = restart(t, s)
	if err := a.RemoveScope(t.Context(), "db"); err != nil || scopesIn(t, s) != "web:dry-run" || len(a.Status(t.Context()).Problems) != 0 {
		t.Errorf("%v, remembered %q", err, scopesIn(t, s))
	}
}

func TestBadScopesFile(t *testing.T) {
	for name, text := range map[string]string{
		"not JSON":         "scopes:",
		"another layout":   `[{"Name":"web","Host":true,"Direction":"both"}]`,
		"an object":        `{"Name":"web"}`,
		"two values":       `[] []`,
		"an unknown mode":  `[{"Name":"web","Host":true,"Mode":"audit"}]`,
		"cut off":          `[{"Name":"web","Host":tr`,
		"a number as name": `[{"Name":7}]`,
	} {
		path := t.TempDir()
		if err := os.WriteFile(filepath.Join(path, scopesFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := loadScopes(path)
		if err == nil || !strings.Contains(err.Error(), scopesFile) || !strings.Contains(err.Error(), "remove the file to start without") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The file is replaced in one step: a write that fails leaves the old one whole,
// and nothing beside it.
func TestSaveScopesIsAtomic(t *testing.T) {
	path := t.TempDir()
	one := []savedScope{{ScopeSettings: ScopeSettings{Name: "one", Host: true}}}
	if err := saveScopes(path, one); err != nil {
		t.Fatal(err)
	}
	var lim, small syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	small = lim
	small.Cur = 0 // no file can be opened any more
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &small); err != nil {
		t.Fatal(err)
	}
	err := saveScopes(path, append(one, savedScope{ScopeSettings: ScopeSettings{Name: "two", Host: true}}))
	if restore := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim); restore != nil {
		t.Fatal(restore)
	}
	if err == nil {
		t.Error("a file was written without a descriptor")
	}
	saved, err := loadScopes(path)
	list, _ := os.ReadDir(path)
	if err != nil || len(saved) != 1 || len(list) != 1 {
		t.Errorf("%+v, %v, %d files", saved, err, len(list))
	}
}

// sleeper runs a program in a namespace until the test ends.
func sleeper(t testing.TB, ns *nettest.NS) int {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd.Process.Pid
}
