package attest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/workload"
)

// activated names the service for which PID 1 holds a listening socket that
// nobody else has (yet): systemd.socket(5). The identity is the one that the
// service's processes will have by the template, or by an entry that asks for
// the unit alone, since nothing else is known of a process not started yet.
func (a *Attestor) activated(ctx context.Context, pid1 proc.Holder, addr netip.AddrPort) (workload.Identity, error) {
	var none workload.Identity
	ev, err := a.evidence(pid1.PID)
	if err != nil {
		return none, err
	}
	services := a.units.receivers(addr)
	switch {
	case len(services) == 0:
		return a.Identify(ctx, ev) // its own: an init program that serves
	case len(services) > 1:
		return none, fmt.Errorf("process 1 holds it, and socket units name %s: %w", strings.Join(services, " and "), workload.ErrAmbiguous)
	}
	unit := cgroup.Unit{Kind: cgroup.Service, Name: services[0]}
	a.units.met(unit)
	f := &finding{evidence: ev, unit: unit, image: &image{}}
	f.systemd(a, a.needs)
	id, err := f.decide(a)
	id.Exe = ""
	return id, err
}

// receivers lists the services whose socket units listen on addr's port, on
// that address or on all.
func (u *units) receivers(addr netip.AddrPort) []string {
	var services []string
	for _, name := range u.sockets() {
		s := parseSocketUnit(name, u.socketFiles(name))
		if s.listens(addr) && !slices.Contains(services, s.service) {
			services = append(services, s.service)
		}
	}
	slices.Sort(services)
	return services
}

// sockets lists the names of socket units that have a file.
func (u *units) sockets() []string {
	var names []string
	for _, dir := range u.dirs {
		files, _ := filepath.Glob(filepath.Join(dir, "*.socket")) // the pattern is well-formed
		for _, f := range files {
			names = append(names, filepath.Base(f))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// socketFiles lists the unit file that counts and then its drop-ins, by name.
func (u *units) socketFiles(name string) []string {
	var unit string
	dropIns := make(map[string]string)
	for _, dir := range slices.Backward(u.dirs) { // the most important last
		p := filepath.Join(dir, name)
		if fi, err := os.Stat(p); err == nil {
			unit = ""
			// A masked unit is a link to /dev/null, an alias one to another
			// name, under which the unit is found as well.
			if fi.Mode().IsRegular() && !alias(p, name) {
				unit = p
			}
		}
		extra, _ := filepath.Glob(filepath.Join(p+".d", "*.conf"))
		for _, d := range extra {
			dropIns[filepath.Base(d)] = d
		}
	}
	if unit == "" {
		return nil
	}
	files := []string{unit}
	order := make([]string, 0, len(dropIns))
	for base := range dropIns {
		order = append(order, base)
	}
	slices.Sort(order)
	for _, base := range order {
		files = append(files, dropIns[base])
	}
	return files
}

func alias(link, name string) bool {
	to, err := os.Readlink(link)
	return err == nil && filepath.Base(to) != name
}

type socketUnit struct {
	service string
	accept  bool
	listen  []netip.AddrPort // an unspecified address means all of that and, for ::, of both families
}

// maxUnitFile bounds a unit file's length; real ones have some hundred bytes.
const maxUnitFile = 64 << 10

func parseSocketUnit(name string, files []string) socketUnit {
	stem := strings.TrimSuffix(name, ".socket")
	s := socketUnit{}
	for _, file := range files {
		s.read(file)
	}
	switch {
	case s.accept: // one instance for each connection; the template stands for all
		s.service = stem + "@.service"
	case s.service == "":
		s.service = stem + ".service"
	}
	return s
}

func (s *socketUnit) read(file string) {
	f, err := os.Open(file)
	if err != nil {
		return // removed since it was listed
	}
	defer f.Close()
	section := ""
	for lines := bufio.NewScanner(io.LimitReader(f, maxUnitFile)); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(line, "[") {
			section = line
		}
		if key, value, ok := strings.Cut(line, "="); ok && section == "[Socket]" {
			s.set(strings.TrimSpace(key), strings.TrimSpace(value))
		}
	}
}

func (s *socketUnit) set(key, value string) {
	switch key {
	case "ListenStream":
		s.add(value)
	case "Service":
		s.service = value
	case "Accept":
		s.accept = slices.Contains([]string{"1", "yes", "y", "true", "t", "on"}, strings.ToLower(value))
	}
}

// add takes one ListenStream= value. An empty one resets the list; paths,
// abstract names and vsock are no TCP.
func (s *socketUnit) add(value string) {
	if value == "" {
		s.listen = nil
		return
	}
	if port, err := strconv.ParseUint(value, 10, 16); err == nil {
		s.listen = append(s.listen, netip.AddrPortFrom(netip.IPv6Unspecified(), uint16(port)))
	} else if ap, err := netip.ParseAddrPort(value); err == nil {
		s.listen = append(s.listen, netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()))
	}
}

func (s *socketUnit) listens(addr netip.AddrPort) bool {
	for _, l := range s.listen {
		ip := addr.Addr()
		if l.Port() == addr.Port() && (l.Addr() == ip || l.Addr().IsUnspecified() || !ip.IsValid() || ip.IsUnspecified()) {
			return true
		}
	}
	return false
}
