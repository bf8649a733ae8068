package attest

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/proc"
)

// standing says how far the path of an executable can be believed.
type standing struct {
	// named: in the host's mount namespace the path names the executed file. A
	// process with a mount namespace of its own (any user can make one) may call
	// any file by any name.
	named bool
	// owned: nobody but root can change what the path names.
	owned bool
	// why not, for people.
	why string
}

// judge looks at an executable's path on the host.
func (a *Attestor) judge(img *proc.Image) standing {
	exe := &img.Exe
	switch {
	case !filepath.IsAbs(exe.Path):
		return standing{why: "the kernel gives no path (" + exe.Path + ")"}
	case exe.Deleted && !slices.Contains(a.mountNS, img.MountNS):
		return standing{why: "the file was deleted, in a mount namespace of its own"}
	case !exe.Deleted && !sameFile(exe):
		return standing{why: "on the host this path names another file, or none"}
	}
	s := standing{named: true}
	s.why = writable(exe, a.ownedTop)
	s.owned = s.why == ""
	return s
}

func sameFile(exe *proc.Exe) bool {
	var st unix.Stat_t
	return unix.Lstat(exe.Path, &st) == nil && uint64(st.Dev) == exe.Dev && uint64(st.Ino) == exe.Inode
}

// writable says who besides root could put another file in the place of exe, or
// nothing. Directories from the root down are looked at; those above top
// are taken for granted. A POSIX ACL that lets others write shows in the group
// bits, where the ACL mask is.
func writable(exe *proc.Exe, top string) string {
	if why := others(exe.Path, exe.UID, exe.Mode); why != "" {
		return why
	}
	for dir := filepath.Dir(exe.Path); ; dir = filepath.Dir(dir) {
		if !strings.HasPrefix(dir+"/", strings.TrimSuffix(top, "/")+"/") {
			return ""
		}
		var st unix.Stat_t
		if err := unix.Lstat(dir, &st); err != nil {
			return fmt.Sprintf("%s: %v", dir, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return dir + " is no directory any more"
		}
		if why := others(dir, st.Uid, st.Mode); why != "" {
			return why
		}
		if dir == "/" {
			return ""
		}
	}
}

func others(path string, uid, mode uint32) string {
	switch {
	case uid != 0:
		return fmt.Sprintf("%s belongs to uid %d", path, uid)
	case mode&0o022 != 0:
		return fmt.Sprintf("%s is writable for its group or for all (mode %04o)", path, mode&0o7777)
	}
	return ""
}
