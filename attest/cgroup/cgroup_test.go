package cgroup_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/test/nettest"
)

// plain is a tree of ordinary directories, as good as cgroupfs but for handles.
func plain(t *testing.T, dirs ...string) *cgroup.Tree {
	t.Helper()
	mount := t.TempDir()
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(mount, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := cgroup.Open(cgroup.Config{Mount: mount, UnitRoots: []string{"/lab"}})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func TestIDAndPathWithoutHandles(t *testing.T) {
	tree := plain(t, "system.slice/nginx.service", "lab/web.service")
	for _, p := range []string{"/", "/system.slice", "/system.slice/nginx.service", "/lab/web.service"} {
		id, err := tree.ID(p)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := tree.Path(id); err != nil || back != p {
			t.Errorf("%s has id %d, which has path %q (%v)", p, id, back, err)
		}
	}
	if !tree.HasUnit("web.service") || tree.HasUnit("nginx.service") {
		t.Error("HasUnit is to look directly below unit roots only")
	}
}

func TestIDRefusesToClimb(t *testing.T) {
	tree := plain(t, "a")
	for _, p := range []string{"", "a", "/..", "/../etc", "/a/../..", "/a/", "//a", "/missing", "/a/b/c"} {
		if id, err := tree.ID(p); !errors.Is(err, cgroup.ErrNotFound) {
			t.Errorf("%q has id %d (%v), want ErrNotFound", p, id, err)
		}
	}
	if p, err := tree.Path(1 << 62); !errors.Is(err, cgroup.ErrNotFound) {
		t.Errorf("path %q (%v), want ErrNotFound", p, err)
	}
}

func TestOpenRefusesBadRoots(t *testing.T) {
	for _, r := range []string{"lab", "/", "", "/lab/", "/lab/../x"} {
		if _, err := cgroup.Open(cgroup.Config{Mount: t.TempDir(), UnitRoots: []string{r}}); err == nil {
			t.Errorf("unit root %q accepted", r)
		}
	}
}

func TestMountFromTable(t *testing.T) {
	root := t.TempDir()
	if _, err := cgroup.Mount(root); err == nil {
		t.Error("found in an empty directory")
	}
	table := strings.Join([]string{
		"25 1 0:22 / /proc rw,nosuid - proc proc rw",
		"30 1 0:26 /docker/x /elsewhere rw - cgroup2 cgroup2 rw", // a part of the tree: of no use
		`31 1 0:26 / /odd\040place rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate`,
	}, "\n")
	if err := os.MkdirAll(filepath.Join(root, "proc/self"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc/self/mountinfo"), []byte(table), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := cgroup.Mount(root); err != nil || got != filepath.Join(root, "odd place") {
		t.Errorf("mount %q (%v)", got, err)
	}
}

func TestRealHierarchy(t *testing.T) {
	dir, id := nettest.Cgroup(t, "rf-attest")
	tree, err := cgroup.Open(cgroup.Config{})
	if err != nil {
		t.Fatal(err)
	}
	want := strings.TrimPrefix(dir, tree.Root())
	if got, err := tree.ID(want); err != nil || got != id {
		t.Errorf("id %d (%v), want %d", got, err, id)
	}
	if got, err := tree.Path(id); err != nil || got != want {
		t.Errorf("path %q (%v), want %q", got, err, want)
	}
	cmd := exec.Command("/bin/cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); cmd.Wait() }()
	pid := uint32(cmd.Process.Pid)
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(filepath.Base(cmd.Path)), 0); err == nil {
		t.Error("a name was taken for a pid")
	}
	if pids, err := tree.Processes(want); err != nil || slices.Contains(pids, pid) {
		t.Errorf("processes %v (%v)", pids, err)
	}

	// A removed cgroup is gone at once, and its id is not another's.
	gone := filepath.Join(dir, "gone")
	if err := os.Mkdir(gone, 0o755); err != nil {
		t.Fatal(err)
	}
	goneID, err := tree.ID(want + "/gone")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(gone); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(gone, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(gone)
	if p, err := tree.Path(goneID); !errors.Is(err, cgroup.ErrNotFound) {
		t.Errorf("id of a removed cgroup: %q (%v)", p, err)
	}
}

func BenchmarkPath(b *testing.B) {
	nettest.RequireRoot(b)
	tree, err := cgroup.Open(cgroup.Config{})
	if err != nil {
		b.Fatal(err)
	}
	id, err := tree.ID("/")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tree.Path(id); err != nil {
			b.Fatal(err)
		}
	}
}
