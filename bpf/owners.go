package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Owner is one program found at the root of the cgroup v2 tree.
type Owner struct {
	Attach    string `json:"attach"` // attach point, such as CGroupInet4Connect
	Program   uint32 `json:"program_id"`
	Name      string `json:"name"`      // as the kernel cut it, empty if it could not be read
	Ringfence bool   `json:"ringfence"` // named as ours, of this instance or another
}

// Owners lists the programs attached at the cgroup v2 root at the places where
// capture attaches its own, in the order in which they run there. A foreign
// connect hook may rewrite a destination before or after ours.
func Owners(cgroupRoot string) ([]Owner, error) {
	dir, err := os.Open(cgroupRoot)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var out []Owner
	for _, name := range attachOrder() {
		at := attachments[name]
		res, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: at})
		if err != nil {
			return nil, fmt.Errorf("query %s at %s: %w", at, cgroupRoot, err)
		}
		for _, p := range res.Programs {
			o := Owner{Attach: at.String(), Program: uint32(p.ID), Name: programName(p.ID)}
			o.Ringfence = strings.HasPrefix(o.Name, "rf_")
			out = append(out, o)
		}
	}
	return out, nil
}

func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// Check compares what the kernel runs with what Open made live, and names each
// difference: a pin that is gone, a link that was detached or carries another program.
func (i *Instance) Check() []string {
	var out []string
	dir, err := os.Open(i.cgroup)
	if err != nil {
		return []string{err.Error()}
	}
	defer dir.Close()
	for _, name := range attachOrder() {
		if err := i.checkLink(name, int(dir.Fd())); err != nil {
			out = append(out, fmt.Sprintf("%s: %v", name, err))
		}
	}
	return out
}

func (i *Instance) checkLink(name string, cgroup int) error {
	l, err := link.LoadPinnedLink(filepath.Join(i.dir, "links", name), nil)
	if err != nil {
		return fmt.Errorf("pinned link: %w", err)
	}
	defer l.Close()
	have, err := l.Info()
	if err != nil {
		return err
	}
	want, err := i.coll.Programs[name].Info()
	if err != nil {
		return err
	}
	if id, _ := want.ID(); id != have.Program {
		return fmt.Errorf("the link runs program %d, not ours (%d)", have.Program, id)
	}
	res, err := link.QueryPrograms(link.QueryOptions{Target: cgroup, Attach: attachments[name]})
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(res.Programs, func(p link.AttachedProgram) bool { return p.ID == have.Program }) {
		return errors.New("not attached at the cgroup root")
	}
	return nil
}

// CheckSteer reports why a namespace's steering link does not work; nil when it does.
func (i *Instance) CheckSteer(cookie uint64) error {
	l, err := link.LoadPinnedLink(i.steerPath(cookie), nil)
	if err != nil {
		return fmt.Errorf("steering link: %w", err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return err
	}
	if ns := info.NetNs(); ns == nil || ns.NetnsInode == 0 {
		return errors.New("steering link: detached from its namespace")
	}
	return nil
}

// Counters sums the per-CPU counters. The order is that of [Reason].
func (i *Instance) Counters() (map[Reason]uint64, error) {
	out := make(map[Reason]uint64, reasons)
	for r := range reasons {
		var perCPU []uint64
		if err := i.Maps.RfCounters.Lookup(uint32(r), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", r, err)
		}
		for _, n := range perCPU {
			out[r] += n
		}
	}
	return out, nil
}
