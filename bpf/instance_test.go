package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"ringfence.dev/test/nettest"
)

var serial int

// scratch is an instance's place of its own: a cgroup that nobody is in, and a pin directory.
func scratch(t *testing.T) Options {
	t.Helper()
	nettest.RequireRoot(t)
	cgroup, _ := nettest.Cgroup(t, "rf-test-bpf")
	serial++
	o := Options{Instance: "i", CgroupRoot: cgroup, PinRoot: fmt.Sprintf("/sys/fs/bpf/rf-test-bpf-%d-%d", os.Getpid(), serial)}
	t.Cleanup(func() {
		if err := errors.Join(Cleanup(o.PinRoot, o.Instance), os.Remove(o.PinRoot)); err != nil {
			t.Error(err)
		}
	})
	return o
}

func open(t *testing.T, o Options) *Instance {
	t.Helper()
	i, err := Open(o)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { i.Close() })
	return i
}

func attached(t *testing.T, cgroup string) map[string]uint32 {
	t.Helper()
	owners, err := Owners(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]uint32{}
	for _, o := range owners {
		out[o.Attach+" "+o.Name] = o.Program
	}
	return out
}

func TestProbeOnThisKernel(t *testing.T) {
	nettest.RequireRoot(t)
	for _, f := range Probe() {
		if f.Answer == Unknown || f.Cost == "" || f.Fallback == "" || f.MinKernel == "" {
			t.Errorf("%+v", f)
		}
	}
}

// The three answers are kept apart: a probe that failed for another reason says nothing about the kernel.
func TestAnswers(t *testing.T) {
	for err, want := range map[error]Answer{nil: Yes, ebpf.ErrNotSupported: No, os.ErrPermission: Unknown} {
		if got := answerOf(err); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
	if err := error(&FeatureError{"x", "5.7"}); !errors.Is(err, ErrNotSupported) {
		t.Error("a FeatureError does not match ErrNotSupported")
	}
}

// Kernels without BTF, and before bpf_set_retval, load the same object with that code dead.
func TestLoadsWithoutOptionalFeatures(t *testing.T) {
	nettest.RequireRoot(t)
	i := &Instance{}
	for _, p := range probes() {
		f := p.Feature
		f.Answer = No
		if f.Required {
			f.Answer = Yes
		}
		i.features = append(i.features, f)
	}
	if err := i.prepare(nil); err != nil {
		t.Fatal(err)
	}
	if err := i.load(nil); err != nil {
		t.Fatalf("%+v", err)
	}
	defer i.Close()
	prog, err := i.steerProgram(1)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	prog.Close()
}

func TestMissingRequiredFeature(t *testing.T) {
	i := &Instance{features: []Feature{{Name: "sk_lookup", Required: true, Answer: No, MinKernel: "5.9"}}}
	var missing *FeatureError
	if err := i.prepare(nil); !errors.As(err, &missing) || missing.MinKernel != "5.9" {
		t.Errorf("%v", err)
	}
	i.features[0].Answer = Unknown // not a reason to give up: loading will tell
	if err := i.prepare(map[string]uint32{"rf_nothing": 1}); err == nil || errors.As(err, &missing) {
		t.Errorf("a size for an unknown table: %v", err)
	}
}

func TestOpenIsAttachedAndCleanupRemovesAll(t *testing.T) {
	o := scratch(t)
	i := open(t, o)
	if n := len(attached(t, o.CgroupRoot)); n != len(attachments) {
		t.Errorf("%d programs are attached, want %d", n, len(attachments))
	}
	if bad := i.Check(); len(bad) > 0 || i.Adopted() {
		t.Errorf("%q, adopted %v", bad, i.Adopted())
	}
	i.Close()
	i.Close()
	if n := len(attached(t, o.CgroupRoot)); n != len(attachments) {
		t.Errorf("after Close %d programs are attached, want %d", n, len(attachments))
	}
	for range 2 {
		if err := Cleanup(o.PinRoot, o.Instance); err != nil {
			t.Fatal(err)
		}
	}
	if left := attached(t, o.CgroupRoot); len(left) != 0 {
		t.Errorf("after Cleanup %v are attached", left)
	}
	if left, _ := filepath.Glob(o.PinRoot + "/*"); len(left) != 0 {
		t.Errorf("after Cleanup %v are pinned", left)
	}
}

// A foreign program that tolerates no other at one of the places makes the attachment fail half-way.
func TestHalfFailedAttachLeavesNothing(t *testing.T) {
	o := scratch(t)
	dir, err := os.Open(o.CgroupRoot)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	foreign, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet6Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	at := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: foreign, Attach: ebpf.AttachCGroupInet6Connect}
	if err := link.RawAttachProgram(at); err != nil {
		t.Fatal(err)
	}
	if i, err := Open(o); err == nil {
		i.Close()
		t.Fatal("attached beside a program that forbids it")
	} else if !strings.Contains(err.Error(), "rf_connect6") {
		t.Errorf("the error does not name what failed: %v", err)
	}
	left := attached(t, o.CgroupRoot)
	if len(left) != 1 || left["CGroupInet6Connect foreign"] == 0 {
		t.Errorf("attached: %v; want the foreign program only", left)
	}
	if pins, _ := filepath.Glob(o.PinRoot + "/*"); len(pins) != 0 {
		t.Errorf("left pinned: %v", pins)
	}
	err = link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Program: foreign, Attach: ebpf.AttachCGroupInet6Connect})
	if err != nil {
		t.Fatal(err)
	}
	open(t, o) // and nothing stands in the way of the next try
}

// The next agent puts its programs into the same links, on the same tables.
func TestTakeOverKeepsLinksAndTables(t *testing.T) {
	o := scratch(t)
	first := open(t, o)
	if err := first.Maps.RfScopes.Put(uint64(7), &Scope{Mode: ModeEnforce}); err != nil {
		t.Fatal(err)
	}
	before, ids := attached(t, o.CgroupRoot), linkIDs(t, o)
	first.Close()
	second := open(t, o)
	if !second.Adopted() {
		t.Error("the second agent does not know that it took over")
	}
	var s Scope
	if err := second.Maps.RfScopes.Lookup(uint64(7), &s); err != nil || s.Mode != ModeEnforce {
		t.Errorf("the scope is lost: %v", err)
	}
	after := attached(t, o.CgroupRoot)
	if len(after) != len(before) {
		t.Errorf("%d programs attached, before %d", len(after), len(before))
	}
	for name, id := range after {
		if before[name] == id {
			t.Errorf("%s still runs the old program", name)
		}
	}
	if now := linkIDs(t, o); fmt.Sprint(now) != fmt.Sprint(ids) {
		t.Errorf("links %v, before %v", now, ids)
	}
	if bad := second.Check(); len(bad) > 0 {
		t.Errorf("%q", bad)
	}
}

// An agent whose tables have another layout works on its own, and changes the links over when it is ready.
func TestTakeOverWithOtherLayout(t *testing.T) {
	o := scratch(t)
	first := open(t, o)
	before := attached(t, o.CgroupRoot)
	first.Close()
	o.Sizes = map[string]uint32{"rf_notes": 64}
	second := open(t, o)
	if now := attached(t, o.CgroupRoot); fmt.Sprint(now) != fmt.Sprint(before) {
		t.Error("the old programs were replaced before the scopes were in")
	}
	for range 2 {
		if err := second.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if bad := second.Check(); len(bad) > 0 {
		t.Errorf("%q", bad)
	}
	if tables, _ := filepath.Glob(filepath.Join(o.PinRoot, o.Instance, "maps-*")); len(tables) != 1 {
		t.Errorf("tables %v; want one layout", tables)
	}
	second.Close()
	if third := open(t, o); third.Maps.RfNotes.MaxEntries() != 64 {
		t.Error("the third agent has not taken the second's tables")
	}
}

// A link that somebody removed or detached is seen, and attached again by the next agent.
func TestLostLinkIsSeenAndReplaced(t *testing.T) {
	o := scratch(t)
	first := open(t, o)
	if err := os.Remove(filepath.Join(o.PinRoot, o.Instance, "links", "rf_bind4")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(o.PinRoot, o.Instance, "links", "rf_old"), 0o700); err != nil {
		t.Fatal(err)
	}
	if bad := first.Check(); len(bad) != 1 || !strings.HasPrefix(bad[0], "rf_bind4") {
		t.Errorf("%q", bad)
	}
	first.Close()
	if bad := open(t, o).Check(); len(bad) > 0 {
		t.Errorf("%q", bad)
	}
	if left, _ := filepath.Glob(filepath.Join(o.PinRoot, o.Instance, "links", "rf_old")); len(left) != 0 {
		t.Error("what an older version pinned is still there")
	}
}

// A first publication that was cut short by a crash is swept when its process is gone.
func TestSweep(t *testing.T) {
	o := scratch(t)
	open(t, o).Close()
	dead := filepath.Join(o.PinRoot, o.Instance+"~4194304") // beyond the highest pid
	live := filepath.Join(o.PinRoot, fmt.Sprintf("%s~%d", o.Instance, os.Getppid()))
	for _, d := range []string{dead, live} {
		if err := os.MkdirAll(filepath.Join(d, "links"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	open(t, o)
	if _, err := os.Stat(dead); err == nil {
		t.Error("a dead agent's half publication is still there")
	}
	if _, err := os.Stat(live); err != nil {
		t.Error("a living process's publication was swept")
	}
	if err := os.RemoveAll(live); err != nil {
		t.Fatal(err)
	}
}

func linkIDs(t *testing.T, o Options) (ids []link.ID) {
	t.Helper()
	for _, name := range attachOrder() {
		l, err := link.LoadPinnedLink(filepath.Join(o.PinRoot, o.Instance, "links", name), nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, info.ID)
	}
	return ids
}
