package ca

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca/keystore"
	"ringfence.dev/ca/keystore/keystoretest"
)

func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(data)
	}
	return files
}

func wantUnchanged(t *testing.T, dir string, before map[string]string) {
	t.Helper()
	after := snapshot(t, dir)
	for name, data := range before {
		if after[name] != data {
			t.Errorf("%s was changed", name)
		}
	}
	if len(after) != len(before) {
		t.Errorf("%d files, were %d", len(after), len(before))
	}
}

func TestInitTwiceChangesNothing(t *testing.T) {
	dir := newCADir(t, Options{})
	before := snapshot(t, dir)
	if created, err := Init(dir, lab, Options{}); created || err != nil {
		t.Fatalf("second Init = %v, %v", created, err)
	}
	wantUnchanged(t, dir, before)
	for name := range before {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", name, info.Mode(), err)
		}
	}
}

func TestInitRefusesAnotherTrustDomain(t *testing.T) {
	dir := newCADir(t, Options{})
	before := snapshot(t, dir)
	_, err := Init(dir, spiffeid.RequireTrustDomainFromString("other.test"), Options{})
	if !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "lab.test") {
		t.Errorf("Init = %v, want ErrConflict that names lab.test", err)
	}
	wantUnchanged(t, dir, before)
}

func TestInitBadArguments(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	if _, err := Init(dir, spiffeid.TrustDomain{}, Options{}); !errors.Is(err, ErrRefused) {
		t.Errorf("no trust domain: %v", err)
	}
	for _, ttl := range []time.Duration{-time.Second, MaxIntermediateTTL + 1} {
		if _, err := Init(dir, lab, Options{IntermediateTTL: ttl}); !errors.Is(err, ErrRefused) {
			t.Errorf("intermediate of %v: %v", ttl, err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("a refused Init left a directory behind")
	}
}

func TestOpenWithoutCA(t *testing.T) {
	empty := t.TempDir()
	if err := os.Chmod(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{empty, filepath.Join(empty, "none")} {
		if _, err := Open(dir, Options{}); !errors.Is(err, ErrNoCA) || !strings.Contains(err.Error(), "ringfence ca init") {
			t.Errorf("Open = %v, want ErrNoCA with advice", err)
		}
		if _, err := Bundle(dir); !errors.Is(err, ErrNoCA) {
			t.Errorf("Bundle = %v, want ErrNoCA", err)
		}
		if _, err := NewIntermediate(dir, "b", Options{}); !errors.Is(err, ErrNoCA) {
			t.Errorf("NewIntermediate = %v, want ErrNoCA", err)
		}
	}
}

// TestInitSurvivesEveryFault breaks each file operation of the first start in
// each way, as a power cut or a full disk would. The next start must end in one
// working CA, with the root of the first if that one had been stored.
func TestInitSurvivesEveryFault(t *testing.T) {
	for _, fault := range []keystoretest.Fault{keystoretest.Lose, keystoretest.Refuse, keystoretest.Deny} {
		for step, reached := 0, true; reached; step++ {
			t.Run(fmt.Sprintf("fault%d/step%d", fault, step), func(t *testing.T) {
				reached = false
				dir := filepath.Join(t.TempDir(), "ca")
				fs := &keystoretest.FS{At: func(n int, _, _ string) keystoretest.Fault {
					if n != step {
						return keystoretest.Pass
					}
					reached = true
					return fault
				}}
				_, _ = Init(dir, lab, Options{fs: fs}) // may fail or not; what counts is what comes after
				first, _ := os.ReadFile(filepath.Join(dir, rootFile))

				created, err := Init(dir, lab, Options{})
				if err != nil {
					t.Fatalf("the next Init: %v", err)
				}
				second, err := os.ReadFile(filepath.Join(dir, rootFile))
				if err != nil {
					t.Fatal(err)
				}
				if created == (first != nil) {
					t.Errorf("created = %v, but there was a root before: %v", created, first != nil)
				}
				if first != nil && !bytes.Equal(first, second) {
					t.Error("the root was overwritten")
				}
				mustIssue(t, mustOpen(t, dir, Options{}), "spiffe://lab.test/a", 0)
				if n := len(mustOpen(t, dir, Options{}).Status().Roots); n != 1 {
					t.Errorf("%d roots in the bundle", n)
				}
			})
		}
	}
}

func TestDamagedState(t *testing.T) {
	other := mustCA(t, lab, 1, nil, nil)
	foreign := mustCA(t, spiffeid.RequireTrustDomainFromString("other.test"), 1, nil, nil)
	cases := []struct {
		name, file, content string
		want                error
	}{
		{"newer version", stateFile, `{"version":2,"trust_domain":"lab.test"}`, ErrState},
		{"no version", stateFile, `{"trust_domain":"lab.test"}`, ErrState},
		{"not JSON", stateFile, `version 1`, ErrState},
		{"bad trust domain", stateFile, `{"version":1,"trust_domain":"LAB/test"}`, ErrState},
		{"empty state", stateFile, ``, ErrState},
		{"bundle not JSON", bundleFile, `nothing`, ErrState},
		{"bundle without keys", bundleFile, `{}`, ErrState},
		{"empty bundle", bundleFile, `{"keys":[]}`, ErrConflict},
		{"torn intermediate", intermediateFile, "-----BEGIN PRIVATE KEY-----\nMIGHAgEA", ErrState},
		{"intermediate without key", intermediateFile, string(keystore.EncodeCertificates(other.Chain)), keystore.ErrNoKey},
		{"intermediate of another root", intermediateFile, string(mustPEM(t, other)), ErrConflict},
		{"intermediate of another trust domain", intermediateFile, string(mustPEM(t, foreign)), ErrForeign},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := newCADir(t, Options{})
			if err := os.WriteFile(filepath.Join(dir, c.file), []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			before := snapshot(t, dir)
			if _, err := Open(dir, Options{}); !errors.Is(err, c.want) || !strings.Contains(err.Error(), dir) && c.want != ErrConflict {
				t.Errorf("Open = %v, want %v and the file's name", err, c.want)
			}
			if _, err := Init(dir, lab, Options{}); err == nil && c.name != "empty bundle" {
				t.Error("Init took damaged state for a CA")
			}
			if c.name != "empty bundle" { // there Init puts the root back, which is its duty
				wantUnchanged(t, dir, before)
			}
		})
	}
}

func TestUnsafeKeysAreNotUsed(t *testing.T) {
	for _, name := range []string{stateFile, intermediateFile, bundleFile} {
		dir := newCADir(t, Options{})
		if err := os.Chmod(filepath.Join(dir, name), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, Options{}); !errors.Is(err, keystore.ErrUnsafe) || !strings.Contains(err.Error(), "chmod 0600") {
			t.Errorf("%s readable by others: %v", name, err)
		}
	}
	dir := newCADir(t, Options{})
	if err := os.Chmod(filepath.Join(dir, rootFile), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := NewIntermediate(dir, "b", Options{}); !errors.Is(err, keystore.ErrUnsafe) {
		t.Errorf("root readable by others: %v", err)
	}
}

// A machine without a battery: its first start is in the past.
func TestClockBeforeTheProgram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the false clock says 2000
		dir := filepath.Join(t.TempDir(), "ca")
		if _, err := Init(dir, lab, Options{}); !errors.Is(err, ErrClock) {
			t.Fatalf("Init in 2000 = %v, want ErrClock", err)
		}
		sleepTo2030()
		if created, err := Init(dir, lab, Options{}); !created || err != nil {
			t.Fatalf("Init in 2030 = %v, %v", created, err)
		}
	})
}

func TestClockBeforeTheIssuer(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	synctest.Test(t, func(t *testing.T) {
		sleepTo2030()
		if _, err := Init(dir, lab, Options{}); err != nil {
			t.Fatal(err)
		}
	})
	// Now it is before 2030 again.
	a := mustOpen(t, dir, Options{})
	_, err := a.Issue(context.Background(), spiffeid.RequireFromString("spiffe://lab.test/a"), newKey(t).Public(), 0)
	if !errors.Is(err, ErrClock) || !strings.Contains(err.Error(), "2029-12-31") {
		t.Errorf("Issue before the issuer begins = %v, want ErrClock", err)
	}
	if _, err := NewIntermediate(dir, "b", Options{}); !errors.Is(err, ErrClock) {
		t.Errorf("NewIntermediate before the root begins = %v, want ErrClock", err)
	}
}
