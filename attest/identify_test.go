package attest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/workload"
	"ringfence.dev/test/nettest"
)

// hook is evidence as the connect hook gives it about a made-up process.
func hook(h *host, a *Attestor, pid uint32, cgroup string, uid uint32) workload.Evidence {
	h.t.Helper()
	id, err := a.tree.ID(cgroup)
	if err != nil {
		h.t.Fatal(err)
	}
	return workload.Evidence{
		Process: workload.Process{PID: pid, StartTime: uint64(100+pid)*10_000_000 + 4_711, ExecID: 3},
		UID:     uid, GID: uid, CgroupID: id, Source: workload.SourceHook,
	}
}

func segment(t *testing.T, a *Attestor, ev workload.Evidence) string {
	t.Helper()
	id, err := a.Identify(context.Background(), ev)
	if err != nil {
		t.Errorf("pid %d: %v", ev.PID, err)
		return ""
	}
	if id.Evidence != ev {
		t.Errorf("identity rests on %+v, not on %+v", id.Evidence, ev)
	}
	return id.ID.Path()[strings.LastIndexByte(id.ID.Path(), '/')+1:]
}

// The same image under several uids and cgroups, in any order, with and without
// cached results: each connection counts for itself.
func TestUIDAndCgroupAreTheConnections(t *testing.T) {
	h := newHost(t)
	h.file("usr/bin/app", "ELF")
	h.process(50, "/usr/bin/app", "0::/system.slice/a.service\n")
	h.cgroups("0::/system.slice/b.service\n")
	cfg := h.config()
	cfg.Entries = []Entry{{"spiffe://lab.test/root-b", []string{"unix:uid:0", "systemd:id:b.service"}}}
	a := h.attestor(cfg)
	inA, inB := "/system.slice/a.service", "/system.slice/b.service"
	for range 3 {
		for _, c := range []struct {
			cgroup string
			uid    uint32
			want   string
		}{{inA, 0, "a"}, {inB, 0, "root-b"}, {inB, 33, "b"}, {inA, 33, "a"}} {
			if got := segment(t, a, hook(h, a, 50, c.cgroup, c.uid)); got != c.want {
				t.Errorf("in %s as %d: %s, want %s", c.cgroup, c.uid, got, c.want)
			}
		}
	}
	if a.images.size() != 1 || a.results.size() != 4 {
		t.Errorf("%d images, %d results cached", a.images.size(), a.results.size())
	}
}

func TestEvidenceOfAnotherImageIsGone(t *testing.T) {
	h := newHost(t)
	h.file("usr/bin/app", "ELF")
	h.process(50, "/usr/bin/app", "0::/system.slice/a.service\n")
	a := h.attestor(h.config())
	good := hook(h, a, 50, "/system.slice/a.service", 0)
	for name, edit := range map[string]func(*workload.Evidence){
		"started earlier": func(ev *workload.Evidence) { ev.StartTime -= 10_000_000 },
		"started later":   func(ev *workload.Evidence) { ev.StartTime += 10_000_000 },
		"no such process": func(ev *workload.Evidence) { ev.PID = 51 },
		"no such cgroup":  func(ev *workload.Evidence) { ev.CgroupID = 1 << 50 },
	} {
		ev := good
		edit(&ev)
		if id, err := a.Identify(context.Background(), ev); !errors.Is(err, workload.ErrGone) {
			t.Errorf("%s: %s (%v), want ErrGone", name, id.ID, err)
		}
	}
	for name, ev := range map[string]workload.Evidence{"nothing": {}, "no start time": {Process: workload.Process{PID: 50}}} {
		if id, err := a.Identify(context.Background(), ev); !errors.Is(err, workload.ErrUnknown) {
			t.Errorf("%s: %s (%v), want ErrUnknown", name, id.ID, err)
		}
	}
	if got := segment(t, a, good); got != "a" {
		t.Errorf("the real one is %s", got)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	other := good
	other.UID = 7
	if _, err := a.Identify(ctx, other); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A pid that is recycled, or a process that calls execve, after its image was
// cached: whatever evidence is presented, the old executable is not believed.
func TestCachedImageIsCheckedAgain(t *testing.T) {
	nettest.RequireRoot(t)
	h := newHost(t)
	h.file("usr/bin/first", "ELF")
	h.file("usr/bin/second", "ELF2")
	h.process(50, "/usr/bin/first", "0::/\n")
	a := h.attestor(h.config())
	ev, err := a.evidence(50)
	if err != nil {
		t.Fatal(err)
	}
	if got := segment(t, a, ev); got != "first" {
		t.Fatalf("first is %s", got)
	}
	h.file("proc/50/exe", "-> /usr/bin/second")
	if got := segment(t, a, ev); got != "second" {
		t.Errorf("after execve: %s", got)
	}
	stat := h.file("proc/50/stat", "")
	if err := os.Remove(stat); err != nil {
		t.Fatal(err)
	}
	if id, err := a.Identify(context.Background(), ev); !errors.Is(err, workload.ErrGone) {
		t.Errorf("after the end: %s (%v)", id.ID, err)
	}
}

func TestExecIDTellsImagesApart(t *testing.T) {
	nettest.RequireRoot(t)
	h := newHost(t)
	h.file("usr/bin/first", "ELF")
	h.file("usr/bin/second", "ELF2")
	h.process(50, "/usr/bin/first", "0::/\n")
	now, execErr := uint64(3), error(nil)
	cfg := h.config()
	cfg.ExecID = func(workload.Process) (uint64, error) { return now, execErr }
	a := h.attestor(cfg)
	ev := hook(h, a, 50, "/", 0)
	if got := segment(t, a, ev); got != "first" {
		t.Fatalf("first is %s", got)
	}
	h.file("proc/50/exe", "-> /usr/bin/second")
	now = 4
	late := ev // an earlier connection of the first image, whose result is not cached
	late.UID = 5
	if id, err := a.Identify(context.Background(), late); !errors.Is(err, workload.ErrGone) {
		t.Errorf("evidence from before the execve: %s (%v)", id.ID, err)
	}
	ev.ExecID = 4
	if got := segment(t, a, ev); got != "second" {
		t.Errorf("second is %s", got)
	}
	execErr = errors.New("map is gone")
	ev.UID = 6
	if id, err := a.Identify(context.Background(), ev); err == nil {
		t.Errorf("exec id unknown, yet %s", id.ID)
	}
}

// A service that comes to exist takes its name from executables, also from
// those already seen.
func TestServiceTakesItsName(t *testing.T) {
	nettest.RequireRoot(t)
	for how, install := range map[string]func(h *host, a *Attestor){
		"unit file": func(h *host, a *Attestor) { h.file("etc/systemd/system/app.service", "[Unit]") },
		"alias": func(h *host, a *Attestor) {
			h.file("etc/systemd/system/app.service", "-> /usr/lib/systemd/system/x.service")
		},
		"once ran": func(h *host, a *Attestor) {
			h.process(60, "/usr/bin/app", "0::/app.slice/app.service\n")
			segment(h.t.(*testing.T), a, hook(h, a, 60, "/app.slice/app.service", 0))
			os.RemoveAll(h.root + "/cgroup/app.slice")
		},
	} {
		h := newHost(t)
		h.file("usr/bin/app", "ELF")
		h.process(50, "/usr/bin/app", "0::/\n")
		a := h.attestor(h.config())
		ev := hook(h, a, 50, "/", 0)
		if got := segment(t, a, ev); got != "app" {
			t.Errorf("%s: before: %s", how, got)
		}
		install(h, a)
		nettest.Wait(t, how+" to count", func() bool { return segment(t, a, ev) == "app_-program" })
	}
	h := newHost(t)
	h.file("usr/bin/app@1", "ELF")
	h.file("usr/lib/systemd/system/app@.service", "[Unit]")
	h.process(50, "/usr/bin/app@1", "0::/\n")
	a := h.attestor(h.config())
	if got := segment(t, a, hook(h, a, 50, "/", 0)); got != "app_-401_-program" {
		t.Errorf("an instance's name: %s", got)
	}
}

func TestSeenNamesAreBounded(t *testing.T) {
	u := newUnits([]string{}, nil)
	for i := range seenLimit {
		u.seen[strconv.Itoa(i)] = struct{}{}
	}
	if !u.exists("whatever") {
		t.Error("with its memory full, a name passed for one that no service ever had")
	}
}

func TestExecutableStanding(t *testing.T) {
	nettest.RequireRoot(t)
	for name, c := range map[string]struct {
		spoil func(t *testing.T, root string) error
		says  string
	}{
		"fine":                 {func(t *testing.T, root string) error { return nil }, ""},
		"file of another user": {func(t *testing.T, root string) error { return os.Chown(root+"/opt/x/bin/app", 1000, 0) }, "uid 1000"},
		"file group-writable":  {func(t *testing.T, root string) error { return os.Chmod(root+"/opt/x/bin/app", 0o775) }, "writable"},
		"file world-writable":  {func(t *testing.T, root string) error { return os.Chmod(root+"/opt/x/bin/app", 0o757) }, "writable"},
		"directory of another": {func(t *testing.T, root string) error { return os.Chown(root+"/opt/x", 1000, 0) }, "uid 1000"},
		"directory for all":    {func(t *testing.T, root string) error { return os.Chmod(root+"/opt/x/bin", 0o777) }, "writable"},
		"sticky all the same":  {func(t *testing.T, root string) error { return os.Chmod(root+"/opt", 0o777|os.ModeSticky) }, "writable"},
		"directory for group":  {func(t *testing.T, root string) error { return os.Chmod(root+"/opt", 0o775) }, "writable"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.file("opt/x/bin/app", "ELF")
			h.process(50, "/opt/x/bin/app", "0::/\n")
			if err := c.spoil(t, h.root); err != nil {
				t.Fatal(err)
			}
			a := h.attestor(h.config())
			id, err := a.Identify(context.Background(), hook(h, a, 50, "/", 0))
			if c.says == "" {
				if err != nil || id.Name != "app" {
					t.Errorf("%s (%v)", id.ID, err)
				}
				return
			}
			if !errors.Is(err, workload.ErrUnknown) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s (%v), want ErrUnknown about %q", id.ID, err, c.says)
			}
			cfg := h.config()
			cfg.Executables = ExecutablesAny
			a = h.attestor(cfg)
			if got := segment(t, a, hook(h, a, 50, "/", 0)); got != "app_-unverified" {
				t.Errorf("any: %s", got)
			}
		})
	}
}

// A directory of the path that has become a link is somebody's doing.
func TestWritableRefusesLinks(t *testing.T) {
	nettest.RequireRoot(t)
	h := newHost(t)
	h.file("real/bin/app", "ELF")
	h.file("opt", "-> /real")
	exe := &proc.Exe{Path: h.root + "/opt/bin/app", Mode: 0o100755}
	if why := writable(exe, h.root); !strings.Contains(why, "no directory") {
		t.Errorf("judged %q", why)
	}
	if why := writable(&proc.Exe{Path: h.root + "/gone/app", Mode: 0o100755}, h.root); why == "" {
		t.Error("a missing directory passed")
	}
	if why := writable(&proc.Exe{Path: filepath.Join(os.TempDir(), "x"), Mode: 0o100755}, "/"); why == "" {
		t.Error("/tmp passed")
	}
}

func TestTooLargeToHash(t *testing.T) {
	h := newHost(t)
	exe := h.file("usr/bin/app", "")
	if err := os.Truncate(exe, 600<<20); err != nil {
		t.Fatal(err)
	}
	h.process(50, "/usr/bin/app", "0::/system.slice/a.service\n")
	cfg := h.config()
	cfg.Entries = []Entry{{"spiffe://lab.test/hashed", []string{"unix:sha256:" + strings.Repeat("0", 64)}}}
	a := h.attestor(cfg)
	id, err := a.Identify(context.Background(), hook(h, a, 50, "/system.slice/a.service", 0))
	if err != nil || id.ID.Path() != "/ns/a/sa/a" {
		t.Fatalf("%s (%v)", id.ID, err)
	}
	for _, s := range id.Selectors {
		if strings.HasPrefix(s.Value, "sha256:") {
			t.Errorf("selector %s", s)
		}
	}
}

func TestCachesAreBounded(t *testing.T) {
	h := newHost(t)
	h.file("usr/bin/app", "ELF")
	cfg := h.config()
	cfg.CacheSize = 4
	h.cgroups("0::/system.slice/a.service\n")
	a := h.attestor(cfg)
	for pid := range 20 {
		h.process(100+pid, "/usr/bin/app", "0::/system.slice/a.service\n")
		segment(t, a, hook(h, a, uint32(100+pid), "/system.slice/a.service", 0))
	}
	if a.images.size() != 4 || a.results.size() != 4 {
		t.Errorf("%d images, %d results, want 4 of each", a.images.size(), a.results.size())
	}
}

// Supplementary groups are the process's own, and it may change them.
func TestSupplementaryGroupsAreFresh(t *testing.T) {
	h := newHost(t)
	h.file("usr/bin/app", "ELF")
	h.process(50, "/usr/bin/app", "0::/system.slice/a.service\n")
	cfg := h.config()
	cfg.Entries = []Entry{{"spiffe://lab.test/certs", []string{"unix:supplementary_group:ssl-cert"}}}
	a := h.attestor(cfg)
	ev := hook(h, a, 50, "/system.slice/a.service", 33)
	if got := segment(t, a, ev); got != "certs" {
		t.Errorf("with the group: %s", got)
	}
	h.file("proc/50/status", "Name:\tx\nUid:\t33\t33\t33\t33\nGid:\t33\t33\t33\t33\nGroups:\t33 \n")
	if got := segment(t, a, ev); got != "a" {
		t.Errorf("without it: %s", got)
	}
}

// Evidence that no hook took has no gid; it must not count as gid 0.
func TestGIDOfWeakEvidence(t *testing.T) {
	h := newHost(t)
	h.file("usr/bin/app", "ELF")
	h.process(50, "/usr/bin/app", "0::/system.slice/a.service\n")
	a := h.attestor(h.config())
	ev := hook(h, a, 50, "/system.slice/a.service", 33)
	ev.GID, ev.Source = 0, workload.SourceSockDiag
	id, err := a.Identify(context.Background(), ev)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range id.Selectors {
		if s.String() == "unix:gid:0" {
			t.Error("gid 0 out of nothing")
		}
	}
}

func BenchmarkIdentify(b *testing.B) {
	nettest.RequireRoot(b)
	a, err := New(Config{TrustDomain: testDomain, Host: "a", Executables: ExecutablesAny})
	if err != nil {
		b.Fatal(err)
	}
	weak, err := a.evidence(uint32(os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	strong := weak
	strong.ExecID, strong.Source = 7, workload.SourceHook
	run := func(name string, ev workload.Evidence, before func()) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				before()
				if _, err := a.Identify(context.Background(), ev); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("cached", strong, func() {})
	run("image cached", weak, func() {})
	run("cold", strong, func() {
		a.images, a.results = newLRU[imageKey, *image](8), newLRU[resultKey, result](8)
	})
}
