package ebpf

import (
	"context"
	"fmt"
	"net"
	"os"
	"testing"

	"ringfence.dev/agent/capture"
	"ringfence.dev/bpf"
	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

// Ports that nobody listens on any more give their room back, whoever counted
// them, and a full table is left once there is room.
func TestReclaim(t *testing.T) {
	nettest.RequireRoot(t)
	tree, _ := nettest.Cgroup(t, "rf-test-reclaim")
	if err := os.Mkdir(tree+"/agent", 0o755); err != nil {
		t.Fatal(err)
	}
	root := fmt.Sprintf("/sys/fs/bpf/rf-test-reclaim-%d", os.Getpid())
	t.Cleanup(func() { os.Remove(root) })
	b, err := New(Config{Instance: "r", PinRoot: root, CgroupRoot: tree, AgentCgroup: "agent"})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := b.Close(true); err != nil {
			t.Error(err)
		}
	})
	scratch := nettest.NetNS(t, "rf-test-r")
	ns, err := netns.Open(scratch.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	// This process is outside of the tree, so its listener is known by seeding only.
	l := scratch.Listen(t, "127.0.0.1:0")
	if err := b.Add(context.Background(), capture.Scope{Name: "s", NS: ns}); err != nil {
		t.Fatalf("%+v", err)
	}
	ports := b.inst.Maps.RfPorts
	seeded := bpf.PortKey{Netns: ns.Cookie(), Port: uint16(l.Addr().(*net.TCPAddr).Port), Seeded: 1}
	idle := bpf.PortKey{Netns: ns.Cookie(), Port: 1}
	busy := bpf.PortKey{Netns: ns.Cookie(), Port: 2}
	must(t, ports.Put(idle, &bpf.PortOwner{}))
	must(t, ports.Put(busy, &bpf.PortOwner{Listeners: 1}))
	must(t, b.inst.Maps.RfOverflow.Put(uint32(0), uint32(1)))
	var p bpf.PortOwner
	var n uint32
	must(t, ports.Lookup(seeded, &p))
	must(t, b.reclaim())
	if ports.Lookup(idle, &p) == nil {
		t.Error("a port without listeners keeps its entry")
	}
	must(t, ports.Lookup(busy, &p))
	must(t, ports.Lookup(seeded, &p))
	must(t, b.inst.Maps.RfOverflow.Lookup(uint32(0), &n))
	if n != 0 {
		t.Error("every port still counts as listening")
	}
	l.Close()
	must(t, b.reclaim())
	if ports.Lookup(seeded, &p) == nil {
		t.Error("a seed outlived its listener")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
