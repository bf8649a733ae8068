package agent

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy/flow"
)

func outbound(scope string, n uint32) flow.Flow {
	var ip [4]byte
	binary.BigEndian.PutUint32(ip[:], n)
	return flow.Flow{Scope: scope, Direction: flow.Outbound, Destination: netip.AddrPortFrom(netip.AddrFrom4(ip), 443)}
}

var t0 = time.Unix(1_700_000_000, 0)

func TestObservedCounts(t *testing.T) {
	o := newObserved(10)
	web := workload.Identity{Name: "web", Unit: "web.service"}
	o.add(outbound("s", 1), web, t0, "")
	o.add(outbound("s", 1), web, t0.Add(time.Minute), "left alone")
	// Inbound, the peer's port is left out: two connections are one pair.
	for port := range uint16(2) {
		o.add(flow.Flow{Scope: "s", Direction: flow.Inbound, Source: netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1"), 40000+port),
			Destination: netip.MustParseAddrPort("[2001:db8::2]:80")}, web, t0, "")
	}
	list, forgotten := o.list()
	if len(list) != 2 || forgotten != 0 {
		t.Fatalf("%+v, %d forgotten", list, forgotten)
	}
	in, out := list[1], list[0]
	if out.Peer != "0.0.0.1:443" {
		in, out = out, in
	}
	if out.Count != 2 || out.First != t0 || out.Last != t0.Add(time.Minute) || out.Note != "left alone" || out.Unit != "web.service" {
		t.Errorf("outbound %+v", out)
	}
	if in.Peer != "2001:db8::1" || in.Count != 2 || in.Direction != "inbound" {
		t.Errorf("inbound %+v", in)
	}
}

// The pair silent for longest goes, not the one that came first.
func TestObservedForgetsTheSilent(t *testing.T) {
	o := newObserved(3)
	who := workload.Identity{Name: "w"}
	for n := range uint32(3) {
		o.add(outbound("s", n), who, t0.Add(time.Duration(n)), "")
	}
	o.add(outbound("s", 0), who, t0.Add(10), "") // speaks again
	o.add(outbound("s", 9), who, t0.Add(11), "")
	list, forgotten := o.list()
	var peers []string
	for _, p := range list {
		peers = append(peers, p.Peer)
	}
	if len(list) != 3 || forgotten != 1 || peers[0] != "0.0.0.0:443" || peers[1] != "0.0.0.2:443" || peers[2] != "0.0.0.9:443" {
		t.Errorf("%v, %d forgotten", peers, forgotten)
	}
}

func TestObservedForgetsScope(t *testing.T) {
	o := newObserved(10)
	for n := range uint32(4) {
		o.add(outbound([]string{"a", "b"}[n%2], n), workload.Identity{}, t0, "")
	}
	o.forgetScope("a")
	list, _ := o.list()
	if len(list) != 2 || list[0].Scope != "b" || list[1].Scope != "b" || o.order.Len() != len(o.pairs) {
		t.Errorf("%+v", list)
	}
}

// A scan of the address space stays within the table, and costs the same in a
// full one as in an empty one: the bound is on comparisons, so it is held as a
// generous limit of time that a table walk per insert would miss a hundredfold.
func TestObservedUnderScan(t *testing.T) {
	o := newObserved(maxObserved)
	who := workload.Identity{Name: "scanner"}
	const scan = 200_000
	start := time.Now()
	for n := range uint32(scan) {
		o.add(outbound("s", n), who, t0, "")
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("%d new pairs took %s", scan, took)
	}
	if len(o.pairs) != maxObserved || o.order.Len() != maxObserved || o.forgotten != scan-maxObserved {
		t.Errorf("%d pairs, %d in order, %d forgotten", len(o.pairs), o.order.Len(), o.forgotten)
	}
}

func BenchmarkObservedFull(b *testing.B) {
	o := newObserved(maxObserved)
	who := workload.Identity{Name: "scanner"}
	for n := range uint32(maxObserved) {
		o.add(outbound("s", n), who, t0, "")
	}
	b.ReportAllocs()
	for n := uint32(maxObserved); b.Loop(); n++ {
		o.add(outbound("s", n), who, t0, "")
	}
}
