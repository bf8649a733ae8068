package bpf

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Maps are the tables of an instance; the comments in headers/maps.h tell keys,
// values, who writes and what happens when one is full.
type Maps = captureMaps

// Options say which instance to open. Zero optional fields mean the default.
type Options struct {
	// Instance names the agent: a-z, 0-9, - and _. Required.
	Instance string
	// PinRoot is a directory on bpffs; default [DefaultPinRoot].
	PinRoot string
	// CgroupRoot is the mount of the cgroup v2 tree; default [CgroupRoot].
	CgroupRoot string
	// Sizes overrides the number of entries of tables, by their kernel names.
	Sizes map[string]uint32
}

// Instance is the loaded, attached and pinned program set of one agent.
type Instance struct {
	// Set by Open, then read-only.
	Maps     Maps
	dir      string
	cgroup   string
	layout   string
	spec     *ebpf.CollectionSpec // as prepared for this kernel
	coll     *ebpf.Collection     // all programs but rf_steer
	adopted  bool
	features []Feature
	execs    []link.Link // of rf_exec and rf_exec_soon; none without BTF

	// using held for reading means that the tables are open and listens is mapped.
	using   sync.RWMutex
	closed  bool
	listens []byte // rf_listens, mapped

	// pending means the links still run the programs of an agent with another
	// table layout. Owned by the goroutine that calls Open and Commit.
	pending bool
}

// attachments maps each program that is attached at the cgroup root to its place.
var attachments = map[string]ebpf.AttachType{
	"rf_connect4":    ebpf.AttachCGroupInet4Connect,
	"rf_connect6":    ebpf.AttachCGroupInet6Connect,
	"rf_peername4":   ebpf.AttachCgroupInet4GetPeername,
	"rf_peername6":   ebpf.AttachCgroupInet6GetPeername,
	"rf_sockname4":   ebpf.AttachCgroupInet4GetSockname,
	"rf_sockname6":   ebpf.AttachCgroupInet6GetSockname,
	"rf_sock_create": ebpf.AttachCGroupInetSockCreate,
	"rf_bind4":       ebpf.AttachCGroupInet4Bind,
	"rf_bind6":       ebpf.AttachCGroupInet6Bind,
	"rf_bound4":      ebpf.AttachCGroupInet4PostBind,
	"rf_bound6":      ebpf.AttachCGroupInet6PostBind,
	"rf_flows":       ebpf.AttachCGroupSockOps,
}

// attachOrder puts sockops first: a connect hook whose note nobody files would
// cut connections, and so would one that is left alone when detaching.
func attachOrder() []string {
	names := make([]string, 0, len(attachments))
	for n := range attachments {
		if n != "rf_flows" {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return append([]string{"rf_flows"}, names...)
}

// Open loads the programs and makes them live: attached and pinned for the
// first time, or in place of those that a previous agent of this instance has
// left pinned. Nothing is captured before a scope is in the tables. On error
// nothing of a first attachment is left, and what was pinned before goes on as
// it was. A missing required feature is a [*FeatureError].
func Open(o Options) (*Instance, error) {
	if err := checkInstance(o.Instance); err != nil {
		return nil, err
	}
	if o.PinRoot == "" {
		o.PinRoot = DefaultPinRoot
	}
	if o.CgroupRoot == "" {
		root, err := CgroupRoot()
		if err != nil {
			return nil, err
		}
		o.CgroupRoot = root
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("raise memlock limit: %w", err)
	}
	if err := makePinRoot(o.PinRoot); err != nil {
		return nil, err
	}
	sweep(o.PinRoot, o.Instance)
	i := &Instance{dir: filepath.Join(o.PinRoot, o.Instance), cgroup: o.CgroupRoot}
	i.features = Probe()
	if err := i.prepare(o.Sizes); err != nil {
		return nil, err
	}
	_, err := os.Stat(i.dir)
	switch {
	case err == nil:
		i.adopted = true
		err = i.takeOver()
	case errors.Is(err, fs.ErrNotExist):
		err = i.publish()
	}
	if err == nil {
		err = errors.Join(i.watchExecs(), i.mapListens())
	}
	if err != nil {
		i.Close()
		return nil, err
	}
	return i, nil
}

// prepare reads the embedded object and fits it to the kernel's features.
func (i *Instance) prepare(sizes map[string]uint32) error {
	consts := map[string]string{
		featureBTF:    "rf_btf",
		featureRetval: "rf_retval",
	}
	spec, err := loadCapture()
	if err != nil {
		return err
	}
	delete(spec.Maps, ".bss") // holds only what keeps the types alive
	for name := range spec.Variables {
		if strings.HasPrefix(name, "rf_type_") {
			delete(spec.Variables, name)
		}
	}
	for _, f := range i.features {
		if f.Required && f.Answer == No {
			return &FeatureError{Feature: f.Name, MinKernel: f.MinKernel}
		}
		name, ok := consts[f.Name]
		if !ok || f.Answer != Yes {
			continue
		}
		if err := spec.Variables[name].Set(uint32(1)); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	for name, n := range sizes {
		m, ok := spec.Maps[name]
		if !ok {
			return fmt.Errorf("size of table %q: no such table", name)
		}
		m.MaxEntries = n
	}
	i.spec = spec
	i.layout, err = layoutOf(spec)
	return err
}

// layoutOf is a tag of all tables' shapes, the member names and types of their
// records included, so that agents share a table only if they agree on it.
func layoutOf(spec *ebpf.CollectionSpec) (string, error) {
	h := sha256.New()
	names := make([]string, 0, len(spec.Maps))
	for n := range spec.Maps {
		if strings.HasPrefix(n, "rf_") {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	gf := btf.GoFormatter{}
	for _, n := range names {
		m := spec.Maps[n]
		fmt.Fprintf(h, "%s %s %d %d %d %d\n", n, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags)
		for _, t := range []btf.Type{m.Key, m.Value} {
			if t == nil {
				continue
			}
			text, err := gf.TypeDeclaration("t", t)
			if err != nil {
				return "", fmt.Errorf("describe table %s: %w", n, err)
			}
			fmt.Fprintln(h, text)
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

// load verifies and loads the programs for the cgroup root, on the given tables or on new ones.
func (i *Instance) load(tables map[string]*ebpf.Map) error {
	spec := i.spec.Copy()
	delete(spec.Programs, "rf_steer")
	kernel, err := i.kernelTypes()
	if err != nil {
		return err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		MapReplacements: tables,
		Programs:        ebpf.ProgramOptions{KernelTypes: kernel},
	})
	if err != nil {
		return fmt.Errorf("load programs: %w", err)
	}
	if err := coll.Assign(&i.Maps); err != nil {
		coll.Close()
		return err
	}
	i.coll = coll
	// From here on only rf_steer is loaded, again and again; the rest would be copied each time for nothing.
	maps.DeleteFunc(i.spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return name != "rf_steer" })
	return nil
}

// kernelTypes is what structure offsets are relocated against. Without BTF those are the object's own types:
// the result is wrong, and in code that the verifier has found dead.
func (i *Instance) kernelTypes() (*btf.Spec, error) {
	if !i.Has(featureBTF) {
		return i.spec.Types, nil
	}
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("load kernel types: %w", err)
	}
	return kernel, nil
}

// Adopted reports whether Open found the pins of a previous agent of this instance.
func (i *Instance) Adopted() bool { return i.adopted }

// Features are the probes' answers that the programs were fitted to.
func (i *Instance) Features() []Feature { return slices.Clone(i.features) }

// Has reports whether the kernel has the named feature.
func (i *Instance) Has(name string) bool {
	return slices.ContainsFunc(i.features, func(f Feature) bool { return f.Name == name && f.Answer == Yes })
}

// Close lets go of the descriptors. What is pinned stays and works on. It may be called twice.
func (i *Instance) Close() error {
	i.using.Lock()
	defer i.using.Unlock()
	i.closed = true
	var errs []error
	for _, l := range i.execs {
		errs = append(errs, l.Close())
	}
	i.execs = nil
	if i.listens != nil {
		errs = append(errs, unix.Munmap(i.listens))
		i.listens = nil
	}
	if i.coll != nil {
		i.coll.Close()
		i.coll = nil
		errs = append(errs, i.Maps.Close())
	}
	return errors.Join(errs...)
}

// Cleanup removes everything that an instance has pinned: what it captured is
// captured no more. An instance that is not there is no error.
func Cleanup(pinRoot, instance string) error {
	if err := checkInstance(instance); err != nil {
		return err
	}
	if pinRoot == "" {
		pinRoot = DefaultPinRoot
	}
	sweep(pinRoot, instance)
	return removePins(filepath.Join(pinRoot, instance))
}

// removePins detaches the links under dir, connect hooks before the rest, and removes dir. Closing the last
// descriptor would detach too, but only some time later.
func removePins(dir string) error {
	var errs []error
	links, _ := filepath.Glob(filepath.Join(dir, "links", "*"))
	slices.Sort(links)
	steer, _ := filepath.Glob(filepath.Join(dir, "steer", "*"))
	order := append(links, steer...)
	slices.SortStableFunc(order, func(a, b string) int {
		return cmpBool(filepath.Base(a) == "rf_flows", filepath.Base(b) == "rf_flows")
	})
	for _, path := range order {
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			continue // not a link; removed below
		}
		if d, ok := l.(interface{ Detach() error }); ok {
			err = d.Detach()
		}
		errs = append(errs, err, l.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(dir))...)
}

func cmpBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}
