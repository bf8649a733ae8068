package attest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var testDomain = spiffeid.RequireTrustDomainFromString("lab.test")

// host is a made-up host in a directory: /proc, /cgroup and whatever else a
// test puts there. Paths in it are as trustworthy as their owners and modes,
// what is above is not judged.
type host struct {
	t    testing.TB
	root string
}

func newHost(t testing.TB) *host {
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, root: root}
	h.file("cgroup/.keep", "")
	h.file("etc/passwd", "root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\nalias:x:33:33::/:/bin/sh\n+nis::::::\n")
	h.file("etc/group", "root:x:0:\nwww-data:x:33:\nssl-cert:x:110:www-data\n")
	return h
}

// file writes a file. One whose text begins with "-> " becomes a symbolic link,
// relative to the host's root if it begins with a slash.
func (h *host) file(name, text string) string {
	h.t.Helper()
	p := filepath.Join(h.root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		h.t.Fatal(err)
	}
	os.Remove(p)
	var err error
	if to, ok := strings.CutPrefix(text, "-> "); ok {
		if to = strings.TrimSpace(to); filepath.IsAbs(to) {
			to = h.root + to
		}
		err = os.Symlink(to, p)
	} else {
		err = os.WriteFile(p, []byte(text), 0o755)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return p
}

// process writes a process that runs as uid and gid 33 unless files of its own
// were unpacked before.
func (h *host) process(pid int, exe, cgroup string) {
	h.t.Helper()
	dir := "proc/" + strconv.Itoa(pid)
	h.file(dir+"/stat", strconv.Itoa(pid)+" (x) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 "+strconv.Itoa(100+pid)+" 0 0 0\n")
	h.file(dir+"/status", "Name:\tx\nUid:\t33\t33\t33\t33\nGid:\t33\t33\t33\t33\nGroups:\t33 110 \n")
	h.file(dir+"/cgroup", cgroup)
	h.file(dir+"/exe", "-> "+exe)
	h.file(dir+"/ns/mnt", "-> mnt:[4026531841]")
	h.file(dir+"/ns/pid", "-> pid:[4026531836]")
	h.cgroups(cgroup)
}

// cgroups makes the directories of a process's v2 cgroup.
func (h *host) cgroups(text string) {
	h.t.Helper()
	for line := range strings.Lines(text) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok && !strings.Contains(p, "..") && !strings.Contains(p, "(deleted)") {
			if err := os.MkdirAll(filepath.Join(h.root, "cgroup", p), 0o755); err != nil {
				h.t.Fatal(err)
			}
		}
	}
}

// unpack writes a txtar archive's files and fills in what every process has.
func (h *host) unpack(a *txtar.Archive) {
	h.t.Helper()
	for _, f := range a.Files {
		h.file(f.Name, string(f.Data))
		dir, base := filepath.Split(f.Name)
		switch {
		case base == "cgroup":
			h.cgroups(string(f.Data))
		case base == "exe":
			h.file(dir+"ns/mnt", "-> mnt:[4026531841]")
			h.file(dir+"ns/pid", "-> pid:[4026531836]")
		}
	}
}

func (h *host) config() Config {
	return Config{
		TrustDomain: testDomain, Host: "a", Proc: h.root + "/proc", CgroupMount: h.root + "/cgroup",
		UnitDirs: []string{h.root + "/etc/systemd/system", h.root + "/usr/lib/systemd/system", h.root + "/lib/systemd/system"},
		Passwd:   h.root + "/etc/passwd", Group: h.root + "/etc/group",
	}
}

func (h *host) attestor(cfg Config) *Attestor {
	h.t.Helper()
	if _, err := os.Stat(h.root + "/proc/1"); err != nil {
		h.process(1, "/usr/lib/systemd/systemd", "0::/init.scope\n")
	}
	a, err := New(cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	a.ownedTop = h.root
	h.t.Cleanup(func() { a.Close() })
	return a
}
