package bpf

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"reflect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The Go records must be what the C compiler made of the header: sizes, offsets and no hidden padding.
func TestRecordsMatchBTF(t *testing.T) {
	spec, err := loadCapture()
	if err != nil {
		t.Fatal(err)
	}
	for name, record := range map[string]any{
		"scope": Scope{}, "agent": Agent{}, "conn_key": ConnKey{}, "note": Note{}, "sock_state": SockState{},
		"exemption": Exemption{}, "port_key": PortKey{}, "port": PortOwner{}, "cgroup_key": CgroupKey{}, "listener_key": ListenerKey{},
		"route_key": RouteKey{}, "route": Route{}, "deny_key": DenyKey{}, "event": Event{},
	} {
		var c *btf.Struct
		if err := spec.Types.TypeByName(name, &c); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		g := reflect.TypeOf(record)
		if int(g.Size()) != int(c.Size) {
			t.Errorf("%s: %d bytes in Go, %d in C", name, g.Size(), c.Size)
		}
		end, field := uint32(0), 1 // field 0 is the layout marker
		for _, m := range c.Members {
			if m.Offset.Bytes() != end {
				t.Errorf("%s.%s: hole of %d bytes before it", name, m.Name, m.Offset.Bytes()-end)
			}
			f := g.Field(field)
			if f.Offset != uintptr(m.Offset.Bytes()) {
				t.Errorf("%s.%s: offset %d in Go, %d in C", name, m.Name, f.Offset, m.Offset.Bytes())
			}
			size, err := btf.Sizeof(m.Type)
			if err != nil {
				t.Fatal(err)
			}
			end, field = m.Offset.Bytes()+uint32(size), field+1
		}
		if end != c.Size {
			t.Errorf("%s: hole of %d bytes at its end", name, c.Size-end)
		}
	}
}

// The kernel cuts names at 15 bytes; what is cut could not be found again by name.
func TestNamesFit(t *testing.T) {
	spec, err := loadCapture()
	if err != nil {
		t.Fatal(err)
	}
	for name := range spec.Maps {
		if !strings.HasPrefix(name, ".") && (len(name) > 15 || !strings.HasPrefix(name, "rf_")) {
			t.Errorf("map %s", name)
		}
	}
	for name := range spec.Programs {
		if _, ok := attachments[name]; len(name) > 15 || (!ok && name != "rf_steer" && name != "rf_exec" && name != "rf_exec_soon") {
			t.Errorf("program %s is too long or attached nowhere", name)
		}
	}
}

func TestAddressForms(t *testing.T) {
	for _, text := range []string{"192.0.2.1", "0.0.0.0", "2001:db8::1", "::1"} {
		ip := netip.MustParseAddr(text)
		if got := FromAddress(Address(ip)); got != ip {
			t.Errorf("%s came back as %s", ip, got)
		}
	}
	mapped := netip.MustParseAddr("::ffff:192.0.2.1")
	if Address(mapped) != Address(mapped.Unmap()) {
		t.Error("a mapped address differs from its plain form")
	}
	if FromAddress([4]uint32{}).IsValid() {
		t.Error("zeros are a valid address")
	}
	if FromPort(Port(0x1234)) != 0x1234 || Port(0x1234) != 0x3412 {
		t.Error("ports are not in network byte order")
	}
}

func TestPrefix(t *testing.T) {
	k := Prefix(0x1_0000_0002, netip.MustParsePrefix("192.0.2.77/24"))
	want := RouteKey{Prefixlen: 64 + 96 + 24, NetnsHi: 1, NetnsLo: 2, Dst: Address(netip.MustParseAddr("192.0.2.0"))}
	if diff := cmp.Diff(want, k, cmp.AllowUnexported(RouteKey{})); diff != "" {
		t.Error(diff)
	}
	if k := Prefix(1, netip.MustParsePrefix("::/0")); k.Prefixlen != 64 {
		t.Errorf("default route has %d bits", k.Prefixlen)
	}
}

func TestParseEventRefusesShortRecords(t *testing.T) {
	for n := range EventSize {
		if _, ok := ParseEvent(make([]byte, n)); ok {
			t.Fatalf("%d bytes were taken", n)
		}
	}
	raw := make([]byte, EventSize)
	raw[EventSize-16] = 'x'
	e, ok := ParseEvent(raw)
	if !ok || CommOf(&e) != "x" {
		t.Errorf("comm %q", CommOf(&e))
	}
}

func TestReasonsHaveNames(t *testing.T) {
	seen := map[string]bool{}
	for r := range reasons {
		if s := r.String(); s == "" || seen[s] {
			t.Errorf("reason %d: name %q", r, s)
		} else {
			seen[s] = true
		}
	}
	if reasons.String() != "unknown" {
		t.Error("a reason beyond the last has a name")
	}
}

func TestCgroup2Mount(t *testing.T) {
	for _, c := range []struct {
		line, at string
		ok       bool
	}{
		{"29 23 0:25 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate", "/sys/fs/cgroup", true},
		{"40 30 0:35 / /sys/fs/cgroup/unified rw - cgroup2 cgroup rw", "/sys/fs/cgroup/unified", true},
		{`40 30 0:35 / /mnt/a\040b rw - cgroup2 cgroup rw`, "/mnt/a b", true},
		{"41 30 0:36 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu", "", false},
		{"42 30 0:35 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw", "", false}, // a subtree only
		{"cgroup2", "", false},
		{" - cgroup2 x", "", false},
	} {
		if at, ok := cgroup2Mount(c.line); at != c.at || ok != c.ok {
			t.Errorf("%q: %q, %v", c.line, at, ok)
		}
	}
}

func TestInstanceNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "lab-a_1": true, strings.Repeat("a", 63): true, strings.Repeat("a", 64): false,
		"": false, ".": false, "..": false, "a.b": false, "a/b": false, "A": false, "a~1": false, "a\x00": false,
	} {
		if err := checkInstance(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := Cleanup(t.TempDir(), "../x"); err == nil {
		t.Error("Cleanup left the pin root")
	}
	if _, err := Open(Options{Instance: "a", PinRoot: t.TempDir()}); err == nil || os.Getuid() == 0 && !strings.Contains(err.Error(), "bpf file system") {
		t.Errorf("pins on a plain file system: %v", err)
	}
}
