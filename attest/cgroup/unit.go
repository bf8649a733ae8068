package cgroup

import (
	"path"
	"strings"
)

// Kind says what a [Unit] is.
type Kind uint8

const (
	None    Kind = iota // not below anything that PID 1 manages
	Service             // a .service of PID 1, or a directory below a unit root
	User                // a .service of a user's own manager: proves the user only
	Scope               // a .scope: somebody's processes, adopted and not started by systemd
)

// Unit is the systemd unit that a cgroup path belongs to. The zero value is none.
type Unit struct {
	Kind Kind
	// Name is the unit's full name with its suffix, as systemd escapes it:
	// "nginx.service", "getty@tty1.service", "session-3.scope".
	Name string
	// UID is the decimal user id of a user unit's manager.
	UID string
}

// String is the name by which selectors call the unit: for a user's unit
// "user/1000/foo.service", which no unit of PID 1 can be called.
func (u Unit) String() string {
	if u.Kind == User {
		return "user/" + u.UID + "/" + u.Name
	}
	return u.Name
}

// Short is the name without ".service" or ".scope".
func (u Unit) Short() string {
	return strings.TrimSuffix(strings.TrimSuffix(u.Name, ".service"), ".scope")
}

// UnitOf finds the unit of a cgroup path as systemd lays them out: slices, each
// inside its parent, and in them the units (systemd.slice(5)).
//
// Only the first component that is not a slice counts. Slices belong to PID 1;
// below a service or a scope the tree is delegated, and whoever it is delegated
// to (a container, a user) may call a directory system.slice/sshd.service.
// For the same reason a path that begins with anything else, such as
// /docker/ID or /lxc.payload.web, has no unit, whatever follows.
//
// The direct children called NAME.service of a directory in roots are services
// too: those of a supervisor other than systemd that has been configured.
func UnitOf(p string, roots []string) Unit {
	if !strings.HasPrefix(p, "/") || p != path.Clean(p) {
		return Unit{} // "/../x": outside of our cgroup namespace
	}
	for _, root := range roots {
		if rest, ok := strings.CutPrefix(p, strings.TrimSuffix(root, "/")+"/"); ok {
			if name, _, _ := strings.Cut(rest, "/"); isUnit(name, ".service") {
				return Unit{Kind: Service, Name: name}
			}
		}
	}
	return walk(p)
}

func walk(p string) Unit {
	parent, slice := "", "-.slice"
	rest := p[1:]
	for rest != "" {
		parent = slice
		slice, rest, _ = strings.Cut(rest, "/")
		if !isUnit(slice, ".slice") || !childSlice(parent, slice) {
			break
		}
	}
	name := slice
	switch {
	case isUnit(name, ".scope"):
		return Unit{Kind: Scope, Name: name}
	case !isUnit(name, ".service"):
		return Unit{}
	}
	if uid, ok := manager(parent, name); ok {
		return userUnit(uid, rest)
	}
	return Unit{Kind: Service, Name: name}
}

// childSlice reports whether systemd would put the slice there: a-b.slice is
// only ever inside a.slice, and only slices without a dash are at the top.
func childSlice(parent, slice string) bool {
	stem := strings.TrimSuffix(slice, ".slice")
	up := "-.slice"
	if i := strings.LastIndexByte(stem, '-'); i > 0 {
		up = stem[:i] + ".slice"
	}
	return up == parent
}

// manager reports whether a unit is the service manager of a user, and of which.
func manager(parent, name string) (uid string, ok bool) {
	uid, ok = strings.CutPrefix(strings.TrimSuffix(name, ".service"), "user@")
	return uid, ok && decimal(uid) && parent == "user-"+uid+".slice"
}

// userUnit finds the service inside a user's manager. All of that tree is the
// user's to arrange, so the name is only as good as the uid in front of it.
func userUnit(uid, rest string) Unit {
	name := ""
	for rest != "" {
		name, rest, _ = strings.Cut(rest, "/")
		if !isUnit(name, ".slice") {
			break
		}
	}
	if isUnit(name, ".service") {
		return Unit{Kind: User, Name: name, UID: uid}
	}
	// A user's scopes and loose cgroups are like login sessions: no service.
	return Unit{Kind: Scope, Name: "user@" + uid + ".service"}
}

func decimal(s string) bool {
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return s != "" && len(s) <= 10
}

// isUnit reports whether name is a valid unit name with this suffix
// (systemd.unit(5): at most 255 of these characters).
func isUnit(name, suffix string) bool {
	stem, ok := strings.CutSuffix(name, suffix)
	if !ok || stem == "" || len(name) > 255 || stem[0] == '@' {
		return false
	}
	for _, c := range []byte(stem) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte(`:-_.\@`, c) >= 0) {
			return false
		}
	}
	return true
}
