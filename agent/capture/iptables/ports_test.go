package iptables

import (
	"net"
	"net/netip"
	"testing"

	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/policy/authz"
)

// A kernel before 5.9 does not tell which cgroup a listener is of. The holders do.
func TestListenersThatDoNotTellTheirCgroup(t *testing.T) {
	h := newHost(t, "", nil)
	h.scope.Host = true
	h.scope.Cgroups = []capture.Cgroup{{Path: cg.other}, {Path: cg.work, Covered: true}}
	h.add(authz.DryRun)
	serveWorkload(t, h.ns, cg.other, "192.0.2.1:9090")
	serveWorkload(t, h.ns, cg.work, "192.0.2.1:9091")
	ours := h.ns.Listen(t, "192.0.2.1:0")
	sc, err := h.b.scope("test")
	if err != nil {
		t.Fatal(err)
	}
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if sc.listening, err = sc.diag.Load().Listeners(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range sc.listening {
		sc.listening[i].CgroupID = 0
	}
	sc.listening = append(sc.listening, sockdiag.Socket{Inode: 1 << 60, Source: netip.MustParseAddrPort("192.0.2.1:9099")})
	sc.portsLocked(t.Context())
	want := map[uint16]bool{9090: true, uint16(ours.Addr().(*net.TCPAddr).Port): true}
	for _, p := range sc.spec.ports {
		if p.covered || !want[p.port] {
			t.Errorf("%+v", p)
		}
		delete(want, p.port)
	}
	if len(want) > 0 {
		t.Errorf("not left alone: %v", want)
	}
}

// Looking again and again costs one question as long as the same sockets listen.
func TestSameListenersAreNotWorkedOutAgain(t *testing.T) {
	h := newHost(t, "", nil)
	h.scope.Host = true
	h.scope.Cgroups = []capture.Cgroup{{Path: cg.other}}
	h.add(authz.DryRun)
	sc, err := h.b.scope("test")
	if err != nil {
		t.Fatal(err)
	}
	sample := func() {
		t.Helper()
		sc.mu.Lock()
		defer sc.mu.Unlock()
		if err := sc.followNewPortsLocked(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	mark := []port{{port: 1}}
	sc.spec.ports = mark // stays for as long as nothing is worked out
	sample()
	if len(sc.spec.ports) != 1 || sc.spec.ports[0] != mark[0] {
		t.Errorf("ports = %v", sc.spec.ports)
	}
	d := serveWorkload(t, h.ns, cg.other, "192.0.2.1:9090")
	sample()
	if len(sc.spec.ports) != 1 || sc.spec.ports[0].port != 9090 {
		t.Errorf("with a new listener: ports = %v", sc.spec.ports)
	}
	d.stop()
	sample()
	if len(sc.spec.ports) != 0 {
		t.Errorf("without: ports = %v", sc.spec.ports)
	}
}
