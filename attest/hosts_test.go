package attest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"ringfence.dev/test/nettest"
)

var update = flag.Bool("update", false, "rewrite the expectations of testdata/hosts")

// TestHosts attests every process of every made-up host in testdata/hosts. The
// comment of each archive says where the layout is from, and may hold settings:
//
//	entry ID SELECTOR...   a registration entry
//	roots PATH             a unit root
//	executables any
//	no-v2                  the host has no cgroup v2
//
// The file want/PID of each holds what Explain says. -update rewrites them.
func TestHosts(t *testing.T) {
	nettest.RequireRoot(t) // executables must belong to root
	files, err := filepath.Glob("testdata/hosts/*.txtar")
	if err != nil || len(files) < 8 {
		t.Fatalf("%d hosts (%v)", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) { testHost(t, file) })
	}
}

func testHost(t *testing.T, file string) {
	archive, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t)
	h.unpack(archive)
	cfg := h.config()
	noV2 := settings(t, string(archive.Comment), &cfg)
	a := h.attestor(cfg)
	if noV2 {
		a.tree, a.units.tree = nil, nil
	}
	checked := 0
	for i, f := range archive.Files {
		pid, err := strconv.ParseUint(strings.TrimPrefix(f.Name, "want/"), 10, 32)
		if err != nil {
			continue
		}
		checked++
		got := describe(h, a.ExplainPID(context.Background(), uint32(pid)))
		if *update {
			archive.Files[i].Data = []byte(got)
		} else if diff := cmp.Diff(string(f.Data), got); diff != "" {
			t.Errorf("process %d (-want +got):\n%s", pid, diff)
		}
	}
	if checked == 0 {
		t.Error("nothing is expected of this host")
	}
	if *update {
		if err := os.WriteFile(file, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func settings(t *testing.T, comment string, cfg *Config) (noV2 bool) {
	t.Helper()
	for line := range strings.Lines(comment) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		switch fields[0] {
		case "entry":
			cfg.Entries = append(cfg.Entries, Entry{ID: fields[1], Selectors: fields[2:]})
		case "roots":
			cfg.UnitRoots = fields[1:]
		case "executables":
			cfg.Executables = Executables(fields[1])
		case "no-v2":
			noV2 = true
		}
	}
	return noV2
}

// describe writes an explanation without what changes from run to run.
func describe(h *host, x Explanation) string {
	var b strings.Builder
	if x.Identity != nil {
		fmt.Fprintf(&b, "id %s\nname %s\n", x.Identity.ID, x.Identity.Name)
	}
	for _, kv := range [][2]string{{"rule", x.Rule}, {"unit", x.Unit}, {"note", x.UnitNote}, {"cgroup", x.Cgroup}, {"distrust", x.Distrust}, {"error", x.Error}} {
		if kv[1] != "" {
			fmt.Fprintf(&b, "%s %s\n", kv[0], kv[1])
		}
	}
	for _, s := range x.Selectors {
		if !strings.HasPrefix(s.Value, "sha256:") {
			fmt.Fprintf(&b, "selector %s\n", s)
		}
	}
	for _, e := range x.Entries {
		fmt.Fprintf(&b, "entry %s missing %v\n", e.ID, e.Missing)
	}
	return strings.ReplaceAll(b.String(), h.root, "")
}
