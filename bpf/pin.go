package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

func (i *Instance) mapsDir() string { return "maps-" + i.layout }

// publish attaches everything and pins it under a temporary name, then renames:
// either all of the instance is there or nothing.
func (i *Instance) publish() (err error) {
	if err := i.load(nil); err != nil {
		return err
	}
	tmp := fmt.Sprintf("%s~%d", i.dir, os.Getpid())
	defer func() {
		if err != nil {
			err = errors.Join(err, removePins(tmp))
		}
	}()
	for _, d := range []string{"", "links", "steer", i.mapsDir()} {
		if err := os.Mkdir(filepath.Join(tmp, d), 0o700); err != nil {
			return fmt.Errorf("make pin directory: %w", err)
		}
	}
	if err := i.pinMaps(filepath.Join(tmp, i.mapsDir())); err != nil {
		return err
	}
	for _, name := range attachOrder() {
		if err := i.attach(name, filepath.Join(tmp, "links", name)); err != nil {
			return err
		}
	}
	if err := os.Rename(tmp, i.dir); err != nil {
		return fmt.Errorf("publish pins: %w", err)
	}
	return nil
}

// attach makes one program live at the cgroup root and pins its link.
func (i *Instance) attach(name, path string) error {
	prog := i.coll.Programs[name]
	if prog == nil {
		return fmt.Errorf("attach %s: no such program in the object", name)
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: i.cgroup, Attach: attachments[name], Program: prog})
	if err != nil {
		return fmt.Errorf("attach %s at %s: %w", name, i.cgroup, err)
	}
	defer l.Close()
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin %s (bpf links need Linux 5.7): %w", name, err)
	}
	return nil
}

func (i *Instance) pinMaps(dir string) error {
	for name := range i.spec.Maps {
		if !strings.HasPrefix(name, "rf_") {
			continue // constants are part of the programs
		}
		if err := i.table(name).Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin table %s: %w", name, err)
		}
	}
	return nil
}

// table finds a table by its kernel name.
func (i *Instance) table(name string) *ebpf.Map {
	return map[string]*ebpf.Map{
		"rf_scopes": i.Maps.RfScopes, "rf_agent": i.Maps.RfAgent, "rf_cgroups": i.Maps.RfCgroups,
		"rf_notes": i.Maps.RfNotes, "rf_exempt": i.Maps.RfExempt, "rf_socks": i.Maps.RfSocks,
		"rf_own": i.Maps.RfOwn, "rf_ports": i.Maps.RfPorts, "rf_overflow": i.Maps.RfOverflow,
		"rf_listeners": i.Maps.RfListeners, "rf_routes": i.Maps.RfRoutes, "rf_denies": i.Maps.RfDenies,
		"rf_execs": i.Maps.RfExecs, "rf_listens": i.Maps.RfListens, "rf_events": i.Maps.RfEvents, "rf_counters": i.Maps.RfCounters,
	}[name]
}

func (i *Instance) tables() map[string]*ebpf.Map {
	all := make(map[string]*ebpf.Map)
	for name := range i.spec.Maps {
		if strings.HasPrefix(name, "rf_") {
			all[name] = i.table(name)
		}
	}
	return all
}

// takeOver continues a previous agent's instance. With tables of our layout
// the links get our programs at once. With others our programs start on new
// tables, and the links change over at [Instance.Commit], when the scopes are in.
func (i *Instance) takeOver() error {
	dir := filepath.Join(i.dir, i.mapsDir())
	pinned, err := i.loadTables(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := i.load(nil); err != nil {
			return err
		}
		i.pending = true
		return i.publishTables(dir)
	}
	defer func() {
		for _, m := range pinned {
			m.Close()
		}
	}()
	if err != nil {
		return err
	}
	if err := i.load(pinned); err != nil {
		return err
	}
	return i.swap()
}

func (i *Instance) loadTables(dir string) (map[string]*ebpf.Map, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	found := make(map[string]*ebpf.Map)
	for name := range i.spec.Maps {
		if !strings.HasPrefix(name, "rf_") {
			continue
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if err != nil {
			return found, fmt.Errorf("open pinned table %s: %v", name, err)
		}
		found[name] = m
	}
	return found, nil
}

func (i *Instance) publishTables(dir string) error {
	tmp := fmt.Sprintf("%s~%d", dir, os.Getpid())
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	err := i.pinMaps(tmp)
	if err == nil {
		err = os.Rename(tmp, dir)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return nil
}

// Commit ends a change of table layout: the links get our programs, and the
// tables of the previous agent go. The caller has added its scopes before, so
// that none is uncovered in between. Without such a change it does nothing.
func (i *Instance) Commit() error {
	if !i.pending {
		return nil
	}
	if err := i.swap(); err != nil {
		return err
	}
	i.pending = false
	old, _ := filepath.Glob(filepath.Join(i.dir, "maps-*"))
	var errs []error
	for _, dir := range old {
		if filepath.Base(dir) != i.mapsDir() {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// swap puts our programs into the pinned links, each in one step, and attaches those that are missing.
func (i *Instance) swap() error {
	for _, name := range attachOrder() {
		path := filepath.Join(i.dir, "links", name)
		l, err := link.LoadPinnedLink(path, nil)
		if errors.Is(err, fs.ErrNotExist) {
			if err := i.attach(name, path); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", name, err)
		}
		err = l.Update(i.coll.Programs[name])
		l.Close()
		if err != nil {
			return fmt.Errorf("replace program of pinned link %s: %w", name, err)
		}
	}
	return i.dropUnknownLinks()
}

// dropUnknownLinks detaches what a previous version attached and we do not have.
func (i *Instance) dropUnknownLinks() error {
	entries, err := os.ReadDir(filepath.Join(i.dir, "links"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, ok := attachments[e.Name()]; ok {
			continue
		}
		if err := os.Remove(filepath.Join(i.dir, "links", e.Name())); err != nil {
			return fmt.Errorf("remove link %s: %w", e.Name(), err)
		}
	}
	return nil
}
