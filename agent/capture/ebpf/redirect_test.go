package ebpf_test

import (
	"net/netip"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture/ebpf"
	"ringfence.dev/attest/workload"
	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

func TestRedirect(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	app, err := ebpf.CgroupID(appDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, self string
		job        job
	}{
		{"v4", "192.0.2.1", job{To: "192.0.2.2:80"}},
		{"v6", "2001:db8::1", job{To: "[2001:db8::2]:80"}},
		{"v4-mapped", "::ffff:192.0.2.1", job{To: "192.0.2.2:80", V6: true}},
		{"source address", "192.0.2.1", job{To: "192.0.2.2:80", Bind: "192.0.2.1:0"}},
		{"v6 source address", "2001:db8::1", job{To: "[2001:db8::2]:80", Bind: "[2001:db8::1]:0"}},
		{"privileged source port", "192.0.2.1", job{To: "192.0.2.2:80", Bind: "0.0.0.0:600"}},
		{"fast open", "192.0.2.1", job{To: "192.0.2.2:80", How: "fastopen"}},
		{"deferred fast open", "192.0.2.1", job{To: "192.0.2.2:80", How: "fastopen_connect"}},
		{"second connect", "192.0.2.1", job{To: "192.0.2.2:80", How: "reconnect"}},
		{"other user", "192.0.2.1", job{To: "192.0.2.2:80", UID: 65534}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := nowBoot()
			r := w.run(c.job)
			f := w.flow()
			r.want(t, "agent")
			if r.Peer == "" || r.Self == "" {
				t.Fatalf("workload saw no addresses: %+v", r)
			}
			peer := netip.MustParseAddrPort(c.job.To)
			if f.Destination != peer {
				t.Errorf("destination %s, want %s", f.Destination, peer)
			}
			if got := netip.MustParseAddrPort(r.Peer); netip.AddrPortFrom(got.Addr().Unmap(), got.Port()) != peer {
				t.Errorf("workload sees peer %s", r.Peer)
			}
			if got := netip.MustParseAddrPort(r.Self).Addr().String(); got != c.self {
				t.Errorf("workload sees itself as %s, want %s", got, c.self)
			}
			e := f.Caller
			if int(e.PID) != r.PID || e.UID != uint32(c.job.UID) || e.CgroupID != app || e.Source != workload.SourceHook {
				t.Errorf("caller %+v, want pid %d uid %d cgroup %d", e, r.PID, c.job.UID, app)
			}
			if e.StartTime < before || e.StartTime > nowBoot() || e.ExecID == 0 {
				t.Errorf("start time %d is not after %d, or exec id %d is zero", e.StartTime, before, e.ExecID)
			}
		})
	}
	if n := w.entries("rf_notes"); n != 0 {
		t.Errorf("%d notes are left", n)
	}
}

func nowBoot() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return uint64(ts.Nano())
}

func TestRedirectIoUring(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	if text, err := os.ReadFile("/proc/sys/kernel/io_uring_disabled"); err == nil && text[0] != '0' {
		t.Skip("io_uring is disabled on this machine")
	}
	r := w.run(job{To: "192.0.2.2:80", How: "io_uring"})
	if r.Errno == unix.ENOSYS {
		t.Skip("kernel without io_uring")
	}
	r.want(t, "agent")
	if f := w.flow(); int(f.Caller.PID) != r.PID {
		t.Errorf("caller %d, want %d", f.Caller.PID, r.PID)
	}
}

func TestCgroupIDIsTheInode(t *testing.T) {
	nettest.RequireRoot(t)
	st, err := os.Stat(appDir)
	if err != nil {
		t.Fatal(err)
	}
	// The low half everywhere, the whole of it on 64-bit machines.
	if id := cgroupID(t, appDir); uint32(id) != uint32(st.Sys().(*syscall.Stat_t).Ino) {
		t.Errorf("id %d, inode %d", id, st.Sys().(*syscall.Stat_t).Ino)
	}
	for _, path := range []string{"/proc", "/nonexistent", appDir + "/cgroup.procs"} {
		if _, err := ebpf.CgroupID(path); err == nil {
			t.Errorf("CgroupID(%s) succeeded", path)
		}
	}
}
