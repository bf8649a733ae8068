package attest

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/workload"
)

// imageKey names a process image. Start times are in /proc's ticks, so that
// both kinds of evidence meet.
type imageKey struct {
	pid   uint32
	start uint64
	exec  uint64
}

func keyOf(p workload.Process) imageKey { return imageKey{p.PID, p.StartTime / 10_000_000, p.ExecID} }

// image is a process image with what was concluded from its executable.
type image struct {
	proc.Image
	standing standing // as of the first look: who may change a path rarely changes
}

// finding is what is known about one piece of evidence.
type finding struct {
	evidence  workload.Evidence
	image     *image
	cgroup    string // path below the v2 root, or in name=systemd; empty unknown
	unit      cgroup.Unit
	unitNote  string // why there is no unit, where that is not obvious
	selectors []workload.Selector
	program   string // executable's base name, once the template used it
	clash     bool
	rule      string // which rule gave the ID
}

// look collects evidence's facts. Everything from /proc goes through one handle,
// and the image is looked at once more at the end.
func (a *Attestor) look(ctx context.Context, ev workload.Evidence, want needs) (*finding, error) {
	if ev.PID == 0 || ev.StartTime == 0 {
		return nil, fmt.Errorf("evidence names no process image: %w", workload.ErrUnknown)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h, err := a.proc.Open(ev.PID)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	f := &finding{evidence: ev}
	if f.image, err = a.load(h, ev); err != nil {
		return nil, err
	}
	if err := f.place(a, h); err != nil {
		return nil, err
	}
	if err := f.collect(ctx, a, h, want); err != nil {
		return nil, err
	}
	return f, a.confirm(h, f)
}

// load reads the image or takes it from the cache.
func (a *Attestor) load(h *proc.Handle, ev workload.Evidence) (*image, error) {
	key := keyOf(ev.Process)
	if img, ok := a.images.get(key); ok && (ev.ExecID != 0 || h.Unchanged(&img.Image) == nil) {
		return img, nil
	}
	raw, err := a.proc.ReadHandle(h)
	if err != nil {
		return nil, err
	}
	if !raw.Same(ev.Process) {
		return nil, fmt.Errorf("the pid belongs to another process now: %w", workload.ErrGone)
	}
	if err := a.sameExec(ev); err != nil {
		return nil, err
	}
	img := &image{Image: raw, standing: a.judge(&raw)}
	if err := h.Unchanged(&img.Image); err != nil {
		return nil, err
	}
	a.images.put(key, img)
	return img, nil
}

// sameExec asks the kernel whether the process has called execve since the evidence.
func (a *Attestor) sameExec(ev workload.Evidence) error {
	if a.execID == nil || ev.ExecID == 0 {
		return nil
	}
	now, err := a.execID(ev.Process)
	if err != nil {
		return fmt.Errorf("exec id: %w", err)
	}
	if now > ev.ExecID {
		return fmt.Errorf("executed another program since it connected: %w", workload.ErrGone)
	}
	return nil
}

// confirm rejects what was collected from a process that changed meanwhile.
func (a *Attestor) confirm(h *proc.Handle, f *finding) error {
	if err := a.sameExec(f.evidence); err != nil {
		return err
	}
	return h.Unchanged(&f.image.Image)
}

// place finds the cgroup and its unit. The cgroup is the connection's where the
// evidence has it; otherwise that of the process now.
func (f *finding) place(a *Attestor, h *proc.Handle) error {
	var now proc.Cgroups
	var err error
	if a.named || a.tree == nil || f.evidence.CgroupID == 0 {
		if now, err = h.Cgroups(); err != nil {
			return err
		}
	}
	if err := f.v2Path(a, now); err != nil {
		return err
	}
	if a.tree != nil {
		f.unit = a.tree.Unit(f.cgroup)
	}
	if a.named && !(a.tree != nil && a.tree.Rooted(f.cgroup)) {
		f.reconcile(now.Systemd)
	}
	a.units.met(f.unit)
	return nil
}

func (f *finding) v2Path(a *Attestor, now proc.Cgroups) (err error) {
	switch {
	case a.tree == nil:
		return nil
	case f.evidence.CgroupID != 0:
		f.cgroup, err = a.tree.Path(f.evidence.CgroupID)
		if errors.Is(err, cgroup.ErrNotFound) {
			err = fmt.Errorf("%w: %w", err, workload.ErrGone)
		}
	case now.Removed:
		err = fmt.Errorf("its cgroup was removed: %w", workload.ErrGone)
	default:
		f.cgroup = now.V2
	}
	return err
}

// reconcile brings in systemd's own v1 hierarchy. On a v1 host it alone has
// units; on a hybrid one it mirrors v2, and where the two disagree somebody
// else arranged one of them (a container runtime that knows only v1, say):
// then neither proves a unit.
func (f *finding) reconcile(systemd string) {
	named := cgroup.UnitOf(systemd, nil)
	switch {
	case f.cgroup == "/" || f.cgroup == "":
		f.cgroup, f.unit = systemd, named
	case named != f.unit:
		f.unitNote = fmt.Sprintf("cgroup v2 says %q, name=systemd says %q", f.unit, named)
		f.unit = cgroup.Unit{}
	}
}

// collect turns facts into selectors.
func (f *finding) collect(ctx context.Context, a *Attestor, h *proc.Handle, want needs) error {
	if err := f.who(a, h, want); err != nil {
		return err
	}
	if f.image.standing.named {
		f.add("unix", "path", f.image.Exe.Path)
	}
	if want.sha256 {
		switch sum, err := a.hasher.Sum(ctx, h); {
		case err == nil:
			f.add("unix", "sha256", sum)
		case !errors.Is(err, proc.ErrTooLarge):
			return err
		}
	}
	f.systemd(a, want)
	return nil
}

// who adds the ids of user and groups. The gid is in the evidence only if a
// hook took it; supplementary groups are always those of the process now.
func (f *finding) who(a *Attestor, h *proc.Handle, want needs) error {
	hook := f.evidence.Source == workload.SourceHook
	if want.supplementary || want.supplementaryNames || !hook {
		st, err := h.Status()
		if err != nil {
			return err
		}
		if !hook {
			f.evidence.GID = st.GID
		}
		for _, g := range st.Groups {
			if want.supplementary {
				f.addID("supplementary_gid", g)
			}
			if err := f.addName(want.supplementaryNames, "supplementary_group", a.groups, g); err != nil {
				return err
			}
		}
	}
	f.addID("uid", f.evidence.UID)
	f.addID("gid", f.evidence.GID)
	if err := f.addName(want.user, "user", a.users, f.evidence.UID); err != nil {
		return err
	}
	return f.addName(want.group, "group", a.groups, f.evidence.GID)
}

func (f *finding) systemd(a *Attestor, want needs) {
	if f.unit.Kind == cgroup.None {
		return
	}
	f.add("systemd", "id", f.unit.String())
	switch {
	case f.unit.Kind == cgroup.User:
		// What PID 1 itself says of it.
		f.add("systemd", "id", "user@"+f.unit.UID+".service")
	case f.unit.Kind == cgroup.Service && want.fragment:
		for _, p := range a.units.fragments(f.unit.Name) {
			f.add("systemd", "fragment_path", p)
		}
	}
}

func (f *finding) add(typ, key, value string) {
	f.selectors = append(f.selectors, workload.Selector{Type: typ, Value: key + ":" + value})
}

func (f *finding) addID(key string, id uint32) {
	f.add("unix", key, strconv.FormatUint(uint64(id), 10))
}

func (f *finding) addName(want bool, key string, from *accounts, id uint32) error {
	if !want {
		return nil
	}
	name, ok, err := from.name(id)
	if ok {
		f.add("unix", key, name)
	}
	return err
}

// decide gives the identity: the best entry's, else the template's.
func (f *finding) decide(a *Attestor) (workload.Identity, error) {
	id := workload.Identity{
		Name: filepath.Base(f.image.Exe.Path), Exe: f.image.Exe.Path,
		Evidence: f.evidence, Selectors: f.selectors,
	}
	if f.unit.Kind == cgroup.Service || f.unit.Kind == cgroup.User {
		id.Name, id.Unit = f.unit.Short(), f.unit.String()
	}
	spiffeID, found, err := match(a.entries, f.selectors)
	if err != nil {
		return workload.Identity{}, err
	}
	if found {
		f.rule, id.ID = "entry", spiffeID
		return id, nil
	}
	segment, err := f.segment(a)
	if err == nil {
		id.ID, err = a.template(segment)
	}
	return id, err
}

// segment is the last part of the template: see the kinds in name.go.
func (f *finding) segment(a *Attestor) (string, error) {
	switch f.unit.Kind {
	case cgroup.Service:
		f.rule = "service"
		return unitSegment(f.unit), nil
	case cgroup.User:
		f.rule = "user service"
		return unitSegment(f.unit), nil
	}
	f.rule = "executable"
	name := filepath.Base(f.image.Exe.Path)
	if !f.image.standing.owned {
		if a.executables == ExecutablesRootOwned {
			return "", fmt.Errorf("no unit, and its executable's name proves nothing: %s: %w", f.image.standing.why, workload.ErrUnknown)
		}
		return Escape(name) + markUnverified, nil
	}
	f.program, f.clash = name, a.units.exists(name)
	if f.clash {
		return Escape(name) + markProgram, nil
	}
	return Escape(name), nil
}
