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
)

// scopesFile keeps the scopes that were added or changed at run time, so that
// they survive the agent: what was protected once stays protected until
// somebody says otherwise.
const scopesFile = "scopes.json"

// restoreScopes adds the scopes of the last run that the settings do not name. One
// whose namespace is gone is forgotten.
func (a *Agent) restoreScopes(ctx context.Context) error {
	saved, err := loadScopes(a.settings.StateDir)
	if err != nil {
		return err
	}
	for _, s := range saved {
		if a.configured(s.Name) {
			continue
		}
		switch err := a.addScope(ctx, s); {
		case errors.Is(err, fs.ErrNotExist):
			a.log.Info("scope forgotten: its network namespace is gone", "scope", s.Name)
		case err != nil:
			return err
		}
	}
	return a.rememberScopes()
}

func (a *Agent) configured(name string) bool {
	for _, s := range a.settings.Scopes {
		if s.Name == name {
			return true
		}
	}
	return false
}

// rememberScopes writes down what is not in the settings file.
func (a *Agent) rememberScopes() error {
	var keep []ScopeSettings
	for _, sc := range a.scopeList() {
		a.mu.Lock()
		s := sc.settings
		a.mu.Unlock()
		if !a.configured(s.Name) {
			keep = append(keep, s)
		}
	}
	return saveScopes(a.settings.StateDir, keep)
}

func loadScopes(dir string) ([]ScopeSettings, error) {
	data, err := os.ReadFile(filepath.Join(dir, scopesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var scopes []ScopeSettings
	if err := unmarshalStrict(data, &scopes); err != nil {
		return nil, fmt.Errorf("%s: %w (remove the file to start without the scopes of the last run)", filepath.Join(dir, scopesFile), err)
	}
	return scopes, nil
}

// saveScopes replaces the file in one step; none at all removes it.
func saveScopes(dir string, scopes []ScopeSettings) error {
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
