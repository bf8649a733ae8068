package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

func (i *Instance) steerPath(cookie uint64) string {
	return filepath.Join(i.dir, "steer", strconv.FormatUint(cookie, 16))
}

// Steer makes the inbound program live in a network namespace: fd is its nsfs
// descriptor, cookie its number. A link that a previous agent has pinned gets
// our program in one step. Steering waits for the scope's entry in the tables.
func (i *Instance) Steer(fd int, cookie uint64) error {
	prog, err := i.steerProgram(cookie)
	if err != nil {
		return err
	}
	defer prog.Close()
	path := i.steerPath(cookie)
	if old, err := link.LoadPinnedLink(path, nil); err == nil {
		err = old.Update(prog)
		old.Close()
		if err == nil {
			return nil
		}
		// A link whose namespace is gone cannot be updated, and cookies are not reused: somebody else's file.
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove dead steering link: %w", err)
		}
	}
	l, err := link.AttachNetNs(fd, prog)
	if err != nil {
		return fmt.Errorf("attach rf_steer to namespace %d: %w", cookie, err)
	}
	defer l.Close()
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin steering link: %w", err)
	}
	return nil
}

// steerProgram loads the namespace's own copy: sk_lookup cannot ask for the cookie, so it is a constant in it.
func (i *Instance) steerProgram(cookie uint64) (*ebpf.Program, error) {
	spec := i.spec.Copy()
	if err := spec.Variables["rf_netns"].Set(cookie); err != nil {
		return nil, fmt.Errorf("set rf_netns: %w", err)
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: i.tables()})
	if err != nil {
		return nil, fmt.Errorf("load rf_steer: %w", err)
	}
	defer coll.Close()
	return coll.DetachProgram("rf_steer"), nil
}

// Unsteer removes the inbound program from a namespace. One that is not there is no error.
func (i *Instance) Unsteer(cookie uint64) error {
	path := i.steerPath(cookie)
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		// Detached at once, not when the kernel gets round to it.
		if d, ok := l.(interface{ Detach() error }); ok {
			err = d.Detach()
		}
		l.Close()
	}
	if errors.Is(err, unix.ENOLINK) {
		err = nil
	}
	return errors.Join(err, os.Remove(path))
}

// Steered lists the cookies of the namespaces that have a pinned steering link.
func (i *Instance) Steered() ([]uint64, error) {
	entries, err := os.ReadDir(filepath.Join(i.dir, "steer"))
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, e := range entries {
		if c, err := strconv.ParseUint(e.Name(), 16, 64); err == nil {
			out = append(out, c)
		}
	}
	return out, nil
}
