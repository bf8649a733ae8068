package ebpf

import (
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/bpf"
	"ringfence.dev/cni/netns"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

// The two calls that each connection costs the agent.
func BenchmarkConnection(b *testing.B) {
	nettest.RequireRoot(b)
	tree, _ := nettest.Cgroup(b, "rf-test-bench")
	if err := os.Mkdir(tree+"/agent", 0o755); err != nil {
		b.Fatal(err)
	}
	const root = "/sys/fs/bpf/rf-test-bench"
	back, err := New(Config{Instance: "b", PinRoot: root, CgroupRoot: tree, AgentCgroup: "agent"})
	if err != nil {
		b.Fatalf("%+v", err)
	}
	b.Cleanup(func() {
		back.Close(true)
		os.Remove(root)
	})
	scratch := nettest.NetNS(b, "rf-test-bench")
	ns, err := netns.Open(scratch.Path)
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	if err := back.Add(b.Context(), capture.Scope{Name: "s", NS: ns}); err != nil {
		b.Fatal(err)
	}
	client, server := netip.MustParseAddrPort("127.0.0.1:40000"), netip.MustParseAddrPort("127.0.0.1:15001")

	b.Run("Origin", func(b *testing.B) {
		b.ReportAllocs()
		key, note := bpf.Connection(ns.Cookie(), client, server), bpf.Note{Dst: bpf.Address(server.Addr())}
		for b.Loop() {
			b.StopTimer()
			if err := back.inst.Maps.RfNotes.Put(key, &note); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if _, err := back.Origin("s", flow.Outbound, -1, server, client); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("BeforeConnect", func(b *testing.B) {
		b.ReportAllocs()
		fd, err := ns.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer unix.Close(fd)
		for b.Loop() {
			if err := back.BeforeConnect("s", fd, server, client, flow.Flow{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("AddRemove", func(b *testing.B) {
		b.ReportAllocs()
		if err := back.Remove(b.Context(), "s"); err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if err := back.Add(b.Context(), capture.Scope{Name: "t", NS: ns, Mode: 1}); err != nil {
				b.Fatal(err)
			}
			if err := back.Remove(b.Context(), "t"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
