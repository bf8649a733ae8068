package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ringfence.dev/policy"
	"ringfence.dev/tools/ringfence/lab"
)

func TestArgumentsRefused(t *testing.T) {
	t.Setenv("MODE", "")
	for _, args := range [][]string{{"-mode", "magic"}, {"-mode", "off"}, {"extra"}, {"-nonsense"}} {
		if err := run(t.Context(), args, new(bytes.Buffer)); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
	t.Setenv("MODE", "magic")
	if err := run(t.Context(), nil, new(bytes.Buffer)); err == nil {
		t.Error("MODE=magic is accepted")
	}
}

func TestMissingBinaryIsNamed(t *testing.T) {
	err := requirements(filepath.Join(t.TempDir(), "ringfence"))
	if err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("%v", err)
	}
}

func TestPoliciesAreSound(t *testing.T) {
	for name, text := range map[string]string{"hosts": policies, "here": localPolicy} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name+".cedar"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, p := range policy.Check(dir) {
			t.Errorf("%s: %v", name, p)
		}
	}
}

func TestShowWithoutATerminal(t *testing.T) {
	var out bytes.Buffer
	s := newShow(&out)
	s.step(3, "a line", "said one\nsaid two\n")
	if got, want := out.String(), "ok 3. a line\n        said one\n        said two\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestInterruptedMessage(t *testing.T) {
	if got := leftover(errors.Join(context.Canceled, &cleanupError{errors.New("a cgroup")})); !strings.Contains(got, "a cgroup") {
		t.Errorf("%q does not say what is left", got)
	}
	if got := leftover(context.Canceled); got != "" {
		t.Errorf("%q, though nothing is left", got)
	}
}

func TestServedReadsTheAccessLog(t *testing.T) {
	s := &stage{files: t.TempDir()}
	if _, err := s.served("web", "/x"); err == nil {
		t.Error("a missing log proves that nothing was served")
	}
	if err := os.WriteFile(filepath.Join(s.files, "web.access"), []byte("/orders/7\n/orders/78\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for target, want := range map[string]bool{"/orders/7": true, "/orders": false, "/orders/8": false} {
		if got, err := s.served("web", target); err != nil || got != want {
			t.Errorf("%s: %v, %v", target, got, err)
		}
	}
}

// The identities in the policies follow from the names the lab gives.
func TestNamesAgree(t *testing.T) {
	for _, id := range []string{shop, intruder, web, database} {
		if !strings.HasPrefix(id, "spiffe://lab.test/ns/a/sa/") && !strings.HasPrefix(id, "spiffe://lab.test/ns/b/sa/") {
			t.Errorf("%s is no identity of a lab host", id)
		}
	}
	if !strings.Contains(localPolicy, "/ns/"+lab.Here+"/sa/") {
		t.Error("the policy of this machine names another host")
	}
}
