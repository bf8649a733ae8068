package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"ringfence.dev/cni/netns"
)

// scopesFile keeps the scopes that were added or changed at run time, so that
// they survive the agent: what was protected once stays protected until
// somebody says otherwise.
const scopesFile = "scopes.json"

// savedScope is one entry of the file. A namespace that was named by a process
// is remembered with its cookie and the boot that it belongs to: the same path
// may be another program's tomorrow.
type savedScope struct {
	ScopeSettings
	Cookie uint64 `json:",omitempty"`
	Boot   string `json:",omitempty"`
}

// errOtherNamespace reports a remembered path that leads elsewhere by now.
var errOtherNamespace = fmt.Errorf("another network namespace is there: %w", fs.ErrNotExist)

// savedScopes are those of the last run that the settings do not name.
func (a *Agent) savedScopes() ([]savedScope, error) {
	saved, err := loadScopes(a.settings.StateDir)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(saved, func(s savedScope) bool { return a.configured(s.Name) }), nil
}

func anyHost(saved []savedScope) bool {
	return slices.ContainsFunc(saved, func(s savedScope) bool { return s.Host })
}

// restoreScopes adds the scopes of the last run. One whose namespace is gone is
// forgotten. One that cannot be added is not worth the others' protection: it
// stays in the file, and status says that it is missing; whole is false then.
func (a *Agent) restoreScopes(ctx context.Context, saved []savedScope) (whole bool, err error) {
	var missing []savedScope
	for _, s := range saved {
		err := s.sameNamespace()
		if err == nil {
			err = a.addScope(ctx, s.ScopeSettings)
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			a.log.Info("scope forgotten: its network namespace is gone", "scope", s.Name)
		case err != nil:
			missing = append(missing, s)
			a.log.Error("a scope of the last run is missing", "scope", s.Name, "err", err)
			a.mu.Lock()
			a.missing[s.Name] = fmt.Sprintf("scope %s of the last run is not protected: %v (mend it and restart, or forget it with `ringfence scope remove %s`)", s.Name, err, s.Name)
			a.mu.Unlock()
		}
	}
	return len(missing) == 0, saveScopes(a.settings.StateDir, append(a.unconfigured(), missing...))
}

func (s savedScope) sameNamespace() error {
	if s.Cookie == 0 {
		return nil
	}
	if boot := bootID(); s.Boot != boot {
		return errOtherNamespace
	}
	ns, err := netns.Open(s.Path)
	if err != nil {
		return err
	}
	defer ns.Close()
	if ns.Cookie() != s.Cookie {
		return errOtherNamespace
	}
	return nil
}

// bootID tells one boot of this machine from another; empty where /proc does not say.
func bootID() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

func (a *Agent) configured(name string) bool {
	return !a.settings.DefaultScopes && slices.ContainsFunc(a.settings.Scopes, func(s ScopeSettings) bool { return s.Name == name })
}

// unconfigured are the live scopes that are not in the settings file, except for
// the default one as it is by default.
func (a *Agent) unconfigured() []savedScope {
	var keep []savedScope
	for _, sc := range a.scopeList() {
		a.mu.Lock()
		s := savedScope{ScopeSettings: sc.settings}
		a.mu.Unlock()
		if a.configured(s.Name) || a.settings.DefaultScopes && reflect.DeepEqual(s.ScopeSettings, a.settings.Scopes[0]) {
			continue
		}
		if strings.HasPrefix(s.Path, "/proc/") {
			s.Cookie, s.Boot = sc.ns.Cookie(), bootID()
		}
		keep = append(keep, s)
	}
	return keep
}

// forgetMissingLocked forgets a scope that could not be restored. It reports
// whether there was one of that name.
func (a *Agent) forgetMissingLocked(name string) (bool, error) {
	a.mu.Lock()
	_, is := a.missing[name]
	delete(a.missing, name)
	a.mu.Unlock()
	if !is {
		return false, nil
	}
	return true, a.rememberLocked()
}

// rememberLocked writes down what is not in the settings file. Agent.changing is
// held, so that the file never falls behind. What could not be restored stays.
func (a *Agent) rememberLocked() error {
	before, err := loadScopes(a.settings.StateDir)
	if err != nil {
		return err
	}
	keep := a.unconfigured()
	a.mu.Lock()
	for _, s := range before {
		if _, is := a.missing[s.Name]; is {
			keep = append(keep, s)
		}
	}
	a.mu.Unlock()
	return saveScopes(a.settings.StateDir, keep)
}

func loadScopes(dir string) ([]savedScope, error) {
	path := filepath.Join(dir, scopesFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var scopes []savedScope
	if err := unmarshalStrict(data, &scopes); err != nil {
		return nil, fmt.Errorf("%s: %w (remove the file to start without the scopes of the last run)", path, err)
	}
	return scopes, nil
}

// saveScopes replaces the file in one step; none at all removes it.
func saveScopes(dir string, scopes []savedScope) error {
	path := filepath.Join(dir, scopesFile)
	if len(scopes) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	data, err := json.MarshalIndent(scopes, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+scopesFile+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("remember scopes: %w", err)
	}
	return nil
}

// unmarshalStrict decodes one JSON value and refuses unknown keys and what follows it.
func unmarshalStrict(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}
