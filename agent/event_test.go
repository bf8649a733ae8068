package agent

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/capture"
	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

func TestEvents(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "event")
	ln := ns.Listen(t, "127.0.0.1:8080")
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path}); err != nil {
		t.Fatal(err)
	}
	self, err := proc.New("").Open(uint32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	st, err := self.Stat()
	if err != nil {
		t.Fatal(err)
	}
	me := workload.Evidence{Process: workload.Process{PID: uint32(os.Getpid()), StartTime: st.StartTime}}
	peer := netip.MustParseAddrPort("192.0.2.9:443")
	at := netip.MustParseAddrPort(ln.Addr().(*net.TCPAddr).AddrPort().String())
	in := flow.Flow{Scope: "web", Direction: flow.Inbound, Source: netip.MustParseAddrPort("192.0.2.1:4000"), Destination: at}
	for _, e := range []capture.Event{
		{Kind: capture.Connected, Flow: flow.Flow{Scope: "web", Destination: peer, Caller: me}},
		{Kind: capture.Connected, Flow: flow.Flow{Scope: "web", Destination: peer, Caller: me}, Bypassing: true},
		{Kind: capture.Refused, Comm: "gone", Flow: flow.Flow{Scope: "web", Destination: peer, Caller: workload.Evidence{Process: workload.Process{PID: 4194399, StartTime: 1}}}},
		{Kind: capture.Accepted, Comm: "ksoftirqd/0", Flow: in}, // whom the interrupt interrupted says nothing
		{Kind: capture.Listening, Flow: in},
		{Kind: capture.Closed, Flow: in},
	} {
		e.Time = t0
		a.event(t.Context(), e)
	}
	list, _ := a.observed.list()
	got := map[string]admin.Observation{}
	for _, o := range list {
		got[o.Direction+" "+o.Workload] = o
	}
	name := got["inbound "+baseName(t)]
	if len(list) != 3 || name.Peer != "192.0.2.1" || name.Count != 1 {
		t.Errorf("%+v", list)
	}
	if o := got["outbound "+baseName(t)]; o.Count != 2 || o.Note != "left alone" || o.Exe == "" || o.Peer != peer.String() {
		t.Errorf("%+v", o)
	}
	if o := got["outbound gone"]; o.Note != "refused by the kernel hook" {
		t.Errorf("%+v", o)
	}
}

func baseName(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Base(exe)
}

// A flood of inbound connections asks the kernel once in a while, not once each,
// and what is remembered of ports is bounded.
func TestOwnersSeenAreBounded(t *testing.T) {
	var o ownersSeen
	now := time.Now()
	for n := range uint32(3 * maxOwnersSeen) {
		o.put(seenPort{"s", outbound("s", n).Destination}, ownerSeen{at: now})
	}
	if len(o.by) > maxOwnersSeen {
		t.Errorf("%d remembered", len(o.by))
	}
	k := seenPort{"s", netip.MustParseAddrPort("192.0.2.1:80")}
	o.put(k, ownerSeen{who: workload.Identity{Name: "w"}, at: now})
	if s, ok := o.get(k, now.Add(ownerFresh/2)); !ok || s.who.Name != "w" {
		t.Errorf("%+v, %v", s, ok)
	}
	if _, ok := o.get(k, now.Add(ownerFresh)); ok {
		t.Error("an old answer is still good")
	}
}

// In watch mode programs are named whose name proves nothing; where something is
// decided by names they are not. One program with many ports is one row.
func TestWorkloads(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	ns := nettest.NetNS(t, "workloads")
	for range 300 {
		ns.Listen(t, "127.0.0.1:0")
	}
	if err := addJSON(t, a, ScopeConfig{Name: "web", NetNS: ns.Path}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	rows := a.Status(ctx).Workloads
	if len(rows) != 1 || len(rows[0].Listening) != 300 || rows[0].ID == "" || rows[0].PID != uint32(os.Getpid()) || rows[0].Name != baseName(t) {
		t.Errorf("%d rows, first %+v", len(rows), rows[0])
	}
}
