package cgroup_test

import (
	"bufio"
	"os"
	"strings"
	"testing"

	"ringfence.dev/attest/cgroup"
)

var kinds = map[cgroup.Kind]string{cgroup.None: "none", cgroup.Service: "service", cgroup.User: "user", cgroup.Scope: "scope"}

// TestCorpus holds UnitOf against paths collected from real hosts, and against
// what a container or a user could make below what is delegated to them. Lines
// of testdata/paths.txt: kind, name, path.
func TestCorpus(t *testing.T) {
	f, err := os.Open("testdata/paths.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		fields := strings.Fields(line)
		if len(fields) != 3 {
			t.Fatalf("malformed line %q", line)
		}
		n++
		u := cgroup.UnitOf(fields[2], []string{"/rf-lab-a", "/supervisor/units"})
		if kinds[u.Kind] != fields[0] || u.String() != strings.ReplaceAll(fields[1], "-none-", "") {
			t.Errorf("%s: %s %q, want %s %q", fields[2], kinds[u.Kind], u, fields[0], fields[1])
		}
	}
	if n < 40 {
		t.Errorf("only %d paths", n)
	}
}

func TestShort(t *testing.T) {
	for path, want := range map[string]string{
		"/system.slice/nginx.service":                    "nginx",
		"/system.slice/a.service.service":                "a.service",
		"/system.slice/system-getty.slice/getty@1.scope": "getty@1",
	} {
		if got := cgroup.UnitOf(path, nil).Short(); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

// Without configured roots the lab's paths are nobody's units.
func TestRootsAreOffByDefault(t *testing.T) {
	if u := cgroup.UnitOf("/rf-lab-a/nginx.service", nil); u != (cgroup.Unit{}) {
		t.Errorf("unit %+v", u)
	}
}

// Whatever the path, a service of PID 1 is only ever its first component
// that is no slice.
func FuzzUnitOf(f *testing.F) {
	f.Add("/system.slice/nginx.service")
	f.Add("/user.slice/user-1000.slice/user@1000.service/app.slice/x.service")
	f.Add("/docker/x/system.slice/nginx.service")
	f.Fuzz(func(t *testing.T, path string) {
		u := cgroup.UnitOf(path, nil)
		if u.Kind != cgroup.Service {
			return
		}
		before, _, ok := strings.Cut(path+"/", "/"+u.Name+"/")
		if !ok {
			t.Fatalf("%q: unit %q is not a component", path, u.Name)
		}
		for c := range strings.SplitSeq(strings.TrimPrefix(before, "/"), "/") {
			if before != "" && !strings.HasSuffix(c, ".slice") {
				t.Errorf("%q: unit %q lies below %q", path, u.Name, c)
			}
		}
	})
}
