package iptables

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"ringfence.dev/agent/capture"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/flow"
	"ringfence.dev/test/nettest"
)

func TestHostScopeCoversByCgroup(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.scope.Host = true
		serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
		serveWorkload(t, h.ns, cg.other, "192.0.2.1:9090")
		serveWorkload(t, h.ns, cg.other, "0.0.0.0:9091")
		serveWorkload(t, h.ns, cg.work, "[::]:9092")
		h.add(authz.Enforce)
		h.want(cg.other, "outbound 192.0.2.2:8080", "192.0.2.2:8080") // in no list: covered
		err := h.b.SetCgroups("test", []capture.Cgroup{
			{Path: cg.other, Covered: false},
			{Path: cg.other + "/deep", Covered: true},
			{Path: cg.work, Covered: true},
			{Path: "/gone/for good", Covered: false},
			{Path: "/" + strings.Repeat("x", 600), Covered: false},
			{ID: 1, Path: cg.work, Covered: false}, // the name of another cgroup by now
		})
		if err != nil {
			t.Fatal(err)
		}
		h.want(cg.other, "peer", "192.0.2.2:8080")
		h.want(cg.other+"/deep", "outbound 192.0.2.2:8080", "192.0.2.2:8080")
		h.want(cg.work, "outbound 192.0.2.2:8080", "192.0.2.2:8080")
		h.wantPeer("workload 192.0.2.1:9090", "192.0.2.1:9090")
		h.wantPeer("workload 0.0.0.0:9091", "192.0.2.1:9091")
		h.wantPeer("inbound 192.0.2.1:9092", "192.0.2.1:9092")
		h.wantPeer("inbound [2001:db8::1]:9092", "[2001:db8::1]:9092")
		if wrong := h.b.Verify("test"); len(wrong) > 0 {
			t.Errorf("Verify = %q", wrong)
		}
	})
}

// What is newer than the table is captured where covered cgroups may come, and
// nowhere else: in the root nearly all of a host may be.
func TestNewCgroupIsCapturedAtOnce(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.scope.Host = true
		h.scope.Cgroups = []capture.Cgroup{
			{Path: "/", Below: true}, {Path: cg.base, Below: true}, {Path: cg.agent},
			{Path: cg.other, Below: true}, {Path: cg.other + "/deep"}, {Path: cg.work},
		}
		serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
		serveWorkload(t, h.ns, "/", "192.0.2.1:9090")
		serveWorkload(t, h.ns, cg.other, "192.0.2.1:9091")
		h.add(authz.Enforce) // with its table: there is no moment without
		for cgroup, want := range map[string]string{
			"/": "peer", cg.work: "peer", cg.other + "/deep": "peer", cg.other: "outbound 192.0.2.2:8080",
		} {
			h.want(cgroup, want, "192.0.2.2:8080")
		}
		newer := cg.other + "/newer"
		if err := os.Mkdir(cg.root+newer, 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(cg.root + newer)
		h.want(newer, "outbound 192.0.2.2:8080", "192.0.2.2:8080")

		// Listeners of uncovered cgroups are left alone, the root's among them; one in a
		// new cgroup only once it is known to be uncovered.
		h.wantPeer("workload 192.0.2.1:9090", "192.0.2.1:9090")
		h.wantPeer("workload 192.0.2.1:9091", "192.0.2.1:9091")
		d := serveWorkload(t, h.ns, newer, "192.0.2.1:9092")
		h.b.sample(t.Context(), func(capture.Event) {})
		h.wantPeer("inbound 192.0.2.1:9092", "192.0.2.1:9092")
		if err := h.b.SetCgroups("test", append(h.scope.Cgroups, capture.Cgroup{Path: newer})); err != nil {
			t.Fatal(err)
		}
		h.wantPeer("workload 192.0.2.1:9092", "192.0.2.1:9092")
		h.want(newer, "peer", "192.0.2.2:8080")
		d.stop()
		if wrong := h.b.Verify("test"); len(wrong) > 0 {
			t.Errorf("Verify = %q", wrong)
		}
	})
}

// Names of cgroups are chosen by whoever makes them.
func TestHostileCgroupNames(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.scope.Host = true
		h.add(authz.Enforce)
		for _, name := range []string{`a b`, `q"uote`, `x\x2dy.service`, `-j ACCEPT`, `#`, `$(reboot)`, `'`, `!`, "tab\there", "ümläut"} {
			path := cg.other + "/" + name
			if err := os.Mkdir(cg.root+path, 0o755); err != nil {
				t.Fatal(err)
			}
			err := h.b.SetCgroups("test", []capture.Cgroup{{Path: path, Covered: false}})
			if err != nil {
				t.Errorf("%q: %v", name, err)
			}
			serveOnce := "192.0.2.2:" + strconv.Itoa(8000)
			h.want(cg.other, "outbound "+serveOnce, serveOnce)
			if wrong := h.b.Verify("test"); len(wrong) > 0 {
				t.Errorf("%q: Verify = %q", name, wrong)
			}
			if err := h.b.SetCgroups("test", nil); err != nil {
				t.Error(err)
			}
			if err := os.Remove(cg.root + path); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestIPv6OpenButNotCaptured(t *testing.T) {
	h := newHost(t, "", nil)
	h.scope.Outbound, h.scope.Inbound = h.scope.Outbound[:1], h.scope.Inbound[:1] // the IPv4 ones
	h.add(authz.Enforce)
	if wrong := h.b.Verify("test"); len(wrong) != 1 || !strings.Contains(wrong[0], "IPv6") {
		t.Errorf("Verify = %q", wrong)
	}
	h.peer.Exec(t, "ip", "link", "show")
	h.ns.Exec(t, "ip", "-6", "addr", "flush", "scope", "global")
	h.ns.Exec(t, "sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1")
	if wrong := h.b.Verify("test"); len(wrong) != 0 {
		t.Errorf("without IPv6: Verify = %q", wrong)
	}
}

func TestDemotedLocalTableIsTold(t *testing.T) {
	h := newHost(t, "", nil)
	h.add(authz.Enforce)
	h.ns.Exec(t, "ip", "rule", "add", "pref", "100", "lookup", "local")
	h.ns.Exec(t, "ip", "rule", "add", "pref", "50", "lookup", "77")
	h.ns.Exec(t, "ip", "rule", "del", "pref", "0", "lookup", "local")
	if wrong := h.b.Verify("test"); len(wrong) != 1 || !strings.Contains(wrong[0], "local table") {
		t.Errorf("Verify = %q", wrong)
	}
}

// When conntrack is full, a new connection fails rather than going around, and
// it is counted. The bound is one number for all namespaces, so it is lowered
// for as long as one connect(2) takes.
func TestConntrackFull(t *testing.T) {
	const bound = "/proc/sys/net/netfilter/nf_conntrack_max"
	h := newHost(t, "", nil)
	before, err := os.ReadFile(bound)
	if err != nil {
		t.Fatal(err)
	}
	h.add(authz.DryRun)
	// Entries that are in use: an unused one would be given up for a new connection.
	l := h.peer.Listen(t, "192.0.2.2:8080")
	for range 48 {
		var conn net.Conn
		if err := h.ns.Do(func() (err error) {
			conn, err = net.DialTimeout("tcp", "192.0.2.2:8080", dialLimit)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
	}
	if err := os.WriteFile(bound, []byte("32"), 0); err != nil {
		t.Fatal(err)
	}
	restored := false
	restore := func() {
		if !restored {
			restored = true
			if err := os.WriteFile(bound, before, 0); err != nil {
				t.Error(err)
			}
		}
	}
	defer restore()
	wrong := h.b.Verify("test")
	got := make(chan string, 1)
	go func() {
		text := ""
		_ = h.ns.Do(func() error { text = probeSYN("192.0.2.2:8081"); return nil })
		got <- text
	}()
	text := <-got
	restore()
	if text != "in progress" {
		t.Errorf("connect with a full table: %s", text)
	}
	if !slices.ContainsFunc(wrong, func(s string) bool { return strings.Contains(s, "conntrack is full") }) {
		t.Errorf("Verify with a full table = %q", wrong)
	}
	if n, err := h.b.Dropped("test"); err != nil || n == 0 {
		t.Errorf("Dropped = %d, %v", n, err)
	}
	if wrong := h.b.Verify("test"); !slices.ContainsFunc(wrong, func(s string) bool { return strings.Contains(s, "conntrack dropped") }) {
		t.Errorf("Verify afterwards = %q", wrong)
	}
	tables := h.b.Tables()
	if !slices.ContainsFunc(tables, func(x capture.Table) bool { return x.Name == "conntrack/test" && x.Entries >= 48 && x.Max > x.Entries }) {
		t.Errorf("Tables = %+v", tables)
	}
}

func TestNewNeedsALeaf(t *testing.T) {
	nettest.RequireRoot(t)
	for _, leaf := range []string{"/", "/no/such/cgroup"} {
		if _, err := New(t.Context(), Config{Leaf: leaf}); !errors.Is(err, ErrLeaf) {
			t.Errorf("leaf %q: %v", leaf, err)
		}
	}
}

// Half-way failures leave nothing: a namespace that is closed, a scope twice.
func TestAddFailsWhole(t *testing.T) {
	h := newHost(t, "", nil)
	h.add(authz.Enforce)
	if err := h.b.Add(t.Context(), h.scope); err == nil {
		t.Error("a scope was added twice")
	}
	if err := h.b.Remove(t.Context(), "test"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.b.Add(ctx, h.scope); err == nil {
		t.Error("Add with an ended context succeeded")
	}
	if wrong := h.b.Verify("test"); len(wrong) != 1 || !strings.Contains(wrong[0], "no such scope") {
		t.Errorf("Verify = %q", wrong)
	}
	h.add(authz.Enforce) // and it can be added again
}

func TestCompress(t *testing.T) {
	table := []capture.Cgroup{
		{Path: "/system.slice", Covered: true}, {Path: "system.slice/sshd.service/", Covered: false},
		{Path: "/system.slice/a.service", Covered: true}, {Path: "/user.slice", Covered: false},
		{Path: "/user.slice/b", Covered: false}, {Path: "/user.slice/b/c", Covered: true},
		{Path: "/", Covered: false, Below: true}, {Path: "/app", Below: true}, {Path: "/app/a"}, {Path: "/app/b", Covered: true},
	}
	want := []verdict{
		{"/user.slice/b/c", true}, {"/app/a", false}, {"/system.slice/sshd.service", false},
		{"/app", true}, {"/system.slice", true}, {"/", false},
	}
	if got := compress(table); !slices.Equal(got, want) {
		t.Errorf("compress = %v, want %v", got, want)
	}
}

// Whatever the table, the first rule that matches a path gives the verdict of its
// nearest listed ancestor.
func TestCompressKeepsEveryVerdict(t *testing.T) {
	path := rapid.StringMatching(`(/[ab]){0,4}`)
	rapid.Check(t, func(t *rapid.T) {
		table := map[string]bool{}
		var list []capture.Cgroup
		for _, p := range rapid.SliceOf(path).Draw(t, "paths") {
			covered := rapid.Bool().Draw(t, "covered")
			table[clean(p)] = covered
			list = append(list, capture.Cgroup{Path: p, Covered: covered})
		}
		p := clean(path.Draw(t, "path"))
		want, ok := table[p]
		if !ok {
			want = inherited(table, p)
		}
		got := true
		for _, v := range compress(list) {
			if v.path == "/" || p == v.path || strings.HasPrefix(p, v.path+"/") {
				got = v.covered
				break
			}
		}
		if got != want {
			t.Fatalf("%s: covered = %v, want %v (%v)", p, got, want, compress(list))
		}
	})
}

func FuzzParseTuple(f *testing.F) {
	f.Add(tupleRequest(netip.MustParseAddrPort("127.0.0.1:15001"), netip.MustParseAddrPort("192.0.2.1:40000")))
	f.Add(tupleRequest(netip.MustParseAddrPort("[::1]:15001"), netip.MustParseAddrPort("[2001:db8::1]:40000")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, d, err := parseTuple(b); err == nil && (!s.IsValid() || !d.IsValid()) {
			t.Errorf("%v %v without error", s, d)
		}
	})
}

func FuzzParseDrops(f *testing.F) {
	f.Add("entries drop\n00000001 0000000a\n00000001 00000002\n")
	f.Fuzz(func(t *testing.T, text string) { _, _ = parseDrops(strings.NewReader(text)) })
}

func TestBeforeConnectBindsToTheCallersDevice(t *testing.T) {
	h := newHost(t, "", nil)
	fd, err := h.h.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, device := range []uint32{0, 1} {
		if err := h.b.BeforeConnect("test", fd, famAddr, netip.AddrPort{}, flow.Flow{Device: device}); err != nil {
			t.Errorf("device %d: %v", device, err)
		}
	}
	if err := h.b.BeforeConnect("test", -1, famAddr, netip.AddrPort{}, flow.Flow{Device: 1}); err == nil {
		t.Error("a dial that could not be bound goes on")
	}
	if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX); err != nil || got != 1 {
		t.Errorf("bound to device %d, %v", got, err)
	}
}

// Rules of others in both variants, and the lack of a guard, are told.
func TestLimits(t *testing.T) {
	nettest.RequireRoot(t)
	h := newHost(t, "", nil)
	if len(h.b.tools.Variants()) > 1 {
		h.ns.Exec(t, "iptables-nft", "-A", "INPUT", "-s", "198.51.100.7", "-j", "DROP")
		h.ns.Exec(t, "iptables-legacy", "-A", "INPUT", "-s", "198.51.100.7", "-j", "DROP")
	}
	h.add(authz.DryRun)
	text := strings.Join(h.b.Limits("test"), "\n")
	for _, want := range []string{"no guard process", "weaker evidence", "bound to a device"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not told in\n%s", want, text)
		}
	}
	if len(h.b.tools.Variants()) > 1 && !strings.Contains(text, "both variants") {
		t.Errorf("rules in both variants are not told:\n%s", text)
	}
}

func TestExceptions(t *testing.T) {
	at := func(s string) port {
		a := netip.MustParseAddrPort(s)
		return port{addr: a.Addr(), port: a.Port()}
	}
	got := exceptions(map[port]bool{
		at("0.0.0.0:80"): false, at("192.0.2.1:80"): true, at("192.0.2.2:80"): false, // a wildcard beside specific ones
		at("0.0.0.0:81"): true, at("192.0.2.1:81"): false,
		at("[::]:80"): true, at("192.0.2.9:82"): true, // as everywhere: no rule
	})
	want := []port{at("192.0.2.1:80"), at("192.0.2.1:81"), at("192.0.2.2:80"), at("0.0.0.0:80")}
	want[0].covered = true
	if !slices.Equal(got, want) {
		t.Errorf("exceptions = %v, want %v", got, want)
	}
}

func TestParseDrops(t *testing.T) {
	got, err := parseDrops(strings.NewReader("entries insert_failed drop early_drop\n1 5 a 3\n1 0 2 1\n"))
	if err != nil || got != 12 {
		t.Errorf("drops = %d, %v, want 12", got, err)
	}
	if _, err := parseDrops(strings.NewReader("")); err == nil {
		t.Error("empty statistics are accepted")
	}
	if _, err := parseDrops(strings.NewReader("drop\nzz\n")); err == nil {
		t.Error("nonsense is accepted")
	}
}
