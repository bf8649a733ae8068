// Package arch_test asserts what may import what. The floors are in
// ARCHITECTURE.md; each forbidden pair carries its reason in the failure text.
package arch_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "ringfence.dev/"

// ground are the packages of shared words, that every floor may import: values and small interfaces only.
var ground = []string{"attest/workload", "proxy/flow", "policy/authz", "cni/netns"}

// rule forbids the packages below from to import those below to.
type rule struct{ from, to, reason string }

var rules = []rule{
	{"proxy", "attest", "the relay must not know how a workload was attested: give it an Identifier"},
	{"proxy", "policy", "the relay must not know where policies come from: give it a Decider"},
	{"proxy", "ca", "the relay must not know how SVIDs are made: give it Credentials"},
	{"proxy", "bpf", "the relay must not know how a connection was captured: give it a Network"},
	{"proxy", "agent", "imports point down"},
	{"proxy", "cni", "the relay is given sockets, it does not enter namespaces"},
	{"attest", "proxy", "cores do not import one another"},
	{"attest", "policy", "identity must not depend on what is permitted"},
	{"attest", "ca", "an identity is a name; who signs it is another matter"},
	{"attest", "bpf", "evidence comes in as a value, whatever found it"},
	{"attest", "agent", "imports point down"},
	{"policy", "proxy", "a decision must not depend on how bytes move"},
	{"policy", "attest", "a decision rests on identities, not on evidence"},
	{"policy", "ca", "cores do not import one another"},
	{"policy", "bpf", "cores do not import mechanisms of others"},
	{"policy", "agent", "imports point down"},
	{"ca", "proxy", "cores do not import one another"},
	{"ca", "attest", "the authority signs names, it does not look at processes"},
	{"ca", "policy", "cores do not import one another"},
	{"ca", "agent", "imports point down"},
	{"bpf", "agent", "imports point down"},
	{"bpf", "proxy", "a mechanism knows nothing of what is built on it"},
	{"bpf", "policy", "a mechanism knows nothing of what is built on it"},
	{"bpf", "attest", "a mechanism knows nothing of what is built on it"},
	{"cni", "agent", "imports point down"},
	{"cni", "proxy", "a mechanism knows nothing of what is built on it"},
	{"agent", "tools", "imports point down: the command is the top floor"},
}

// pkg is what we need of `go list -json`.
type pkg struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func TestFloors(t *testing.T) {
	for _, p := range list(t) {
		from := strings.TrimPrefix(p.ImportPath, module)
		for _, imp := range p.Imports {
			to, ours := strings.CutPrefix(imp, module)
			if !ours || isGround(to) {
				continue
			}
			for _, r := range rules {
				if below(from, r.from) && below(to, r.to) {
					t.Errorf("%s imports %s: %s", from, to, r.reason)
				}
			}
			if below(to, "test") && !below(from, "test") {
				t.Errorf("%s imports %s: test helpers do not ship", from, to)
			}
		}
	}
}

// TestGround holds the ground floor to values: no I/O, nothing of ours above it.
func TestGround(t *testing.T) {
	forbidden := []string{"net", "net/http", "os/exec", "golang.org/x/sys/unix", "github.com/cilium/ebpf"}
	for _, p := range list(t) {
		from := strings.TrimPrefix(p.ImportPath, module)
		if !isGround(from) || from == "cni/netns" {
			continue
		}
		for _, imp := range p.Imports {
			if to, ours := strings.CutPrefix(imp, module); ours && !isGround(to) {
				t.Errorf("%s imports %s: shared words stand on nothing of ours", from, to)
			}
			for _, f := range forbidden {
				if imp == f {
					t.Errorf("%s imports %s: shared words do no I/O", from, imp)
				}
			}
		}
	}
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", module+"...")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var all []pkg
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list shows only %d packages", len(all))
	}
	return all
}

func isGround(path string) bool {
	for _, g := range ground {
		if path == g {
			return true
		}
	}
	return false
}

func below(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }
