package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/bpf"
	fw "ringfence.dev/cni/iptables"
)

// healthy is a host that has everything, and whose clock is right.
func healthy() host {
	return host{
		euid: func() int { return 0 },
		probe: func() []bpf.Feature {
			return []bpf.Feature{
				{Name: "connect hooks", Answer: bpf.Yes, Required: true, MinKernel: "4.17"},
				{Name: "socket lookup", Answer: bpf.Yes, Required: true, MinKernel: "5.9"},
				{Name: "iterators", Answer: bpf.Yes, MinKernel: "5.8"},
			}
		},
		variants:   func(context.Context) ([]string, error) { return []string{"nft"}, nil },
		cgroupRoot: func() (string, error) { return "/sys/fs/cgroup", nil },
		ipv6:       func() error { return nil },
		nofile:     func() (uint64, error) { return 1 << 20, nil },
		adjtime:    func() (int, error) { return unix.TIME_OK, nil },
		now:        func() time.Time { return time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC) },
		listening:  func() ([]listener, error) { return nil, nil },
		rules:      func(context.Context) (string, error) { return "", nil },
		owners:     func(string) ([]bpf.Owner, error) { return nil, nil },
		lsm:        func() (string, error) { return "capability,bpf\n", nil },
	}
}

func find(t *testing.T, r Report, name string) Check {
	t.Helper()
	for _, c := range r.Checks {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no check of %q in %+v", name, r)
	return Check{}
}

func TestHealthyHost(t *testing.T) {
	r := examine(t.Context(), Options{Capture: "auto"}, healthy())
	if !r.OK || r.Capture != "ebpf" {
		t.Errorf("%+v", r)
	}
	for _, c := range r.Checks {
		if c.Group != "bypass" && c.State != Found {
			t.Errorf("%+v", c)
		}
		if c.State != Found && c.Cost == "" {
			t.Errorf("%s is %s, at no cost", c.Name, c.State)
		}
	}
	if c := find(t, r, "iptables"); !strings.Contains(c.Detail, "weaker evidence") {
		t.Errorf("%+v", c)
	}
}

// Each thing that can be amiss, what it is called, and whether protection is
// still possible.
func TestEachCheck(t *testing.T) {
	unknown := errors.New("the kernel would not tell")
	probe := func(answer bpf.Answer, required bool) func(h *host) {
		return func(h *host) {
			h.probe = func() []bpf.Feature {
				return []bpf.Feature{{Name: "it", Answer: answer, Required: required, MinKernel: "5.9", Cost: "a cost", Fallback: "a fallback", Err: "why"}}
			}
		}
	}
	for _, c := range []struct {
		name    string
		amiss   func(h *host)
		options Options
		check   string
		state   State
		text    string // in detail, cost, fallback or fix
		ok      bool
		capture string
	}{
		{"not root", func(h *host) { h.euid = func() int { return 1000 } }, Options{}, "root", Broken, "as root", false, "none"},
		{"no hook, but iptables", probe(bpf.No, true), Options{}, "it", Missing, "5.9", true, "iptables"},
		{"no hook, only watching", probe(bpf.No, true), Options{OnlyWatch: true}, "it", Missing, "a fallback", true, "observe"},
		{"no hook, though it was asked for", probe(bpf.No, true), Options{Capture: "ebpf"}, "it", Missing, "a cost", false, "none"},
		{"nobody can tell of a hook", probe(bpf.Unknown, true), Options{}, "it", Unknown, "why", true, "iptables"},
		{"something optional is missing", probe(bpf.No, false), Options{}, "it", Missing, "a cost", true, "ebpf"},
		{"no iptables", func(h *host) {
			h.variants = func(context.Context) ([]string, error) { return nil, fw.ErrNotFound }
		}, Options{}, "iptables", Missing, "install", true, "ebpf"},
		{"no iptables, though it was asked for", func(h *host) {
			h.variants = func(context.Context) ([]string, error) { return nil, fw.ErrNotFound }
		}, Options{Capture: "iptables"}, "iptables", Missing, "install", false, "none"},
		{"iptables fails", func(h *host) { h.variants = func(context.Context) ([]string, error) { return nil, unknown } },
			Options{}, "iptables", Unknown, "would not tell", true, "ebpf"},
		{"no cgroup v2", func(h *host) { h.cgroupRoot = func() (string, error) { return "", unknown } }, Options{}, "cgroup v2", Broken, "mount", false, "none"},
		{"no cgroup v2, only observing", func(h *host) { h.cgroupRoot = func() (string, error) { return "", unknown } },
			Options{Capture: "observe"}, "cgroup v2", Broken, "mount", false, "observe"},
		{"no IPv6", func(h *host) { h.ipv6 = func() error { return unix.EAFNOSUPPORT } }, Options{}, "IPv6", Missing, "no IPv6 either", true, "ebpf"},
		{"few descriptors", func(h *host) { h.nofile = func() (uint64, error) { return 1024, nil } }, Options{}, "descriptors", Warning, "about 512 connections", true, "ebpf"},
		{"descriptors unknown", func(h *host) { h.nofile = func() (uint64, error) { return 0, unknown } }, Options{}, "descriptors", Unknown, "would not tell", true, "ebpf"},
		{"nobody keeps the clock", func(h *host) { h.adjtime = func() (int, error) { return unix.TIME_ERROR, nil } }, Options{}, "clock", Warning, "NTP", true, "ebpf"},
		{"the clock is unknown", func(h *host) { h.adjtime = func() (int, error) { return 0, unknown } }, Options{}, "clock", Unknown, "would not tell", true, "ebpf"},
		{"the clock is plainly wrong", func(h *host) { h.now = func() time.Time { return time.Unix(0, 0) } }, Options{}, "clock", Broken, "set the clock", false, "ebpf"},
		{"a port is taken", func(h *host) {
			h.listening = func() ([]listener, error) { return []listener{{netip.MustParseAddrPort("[::]:15008"), 77}}, nil }
		}, Options{AgentPID: 78}, "port 15008", Broken, "process 77", false, "ebpf"},
		{"a port is taken by nobody known", func(h *host) {
			h.listening = func() ([]listener, error) { return []listener{{netip.MustParseAddrPort("127.0.0.1:15001"), 0}}, nil }
		}, Options{AgentPID: 78}, "port 15001", Broken, "cannot be told", false, "ebpf"},
		{"the metrics port is taken", func(h *host) {
			h.listening = func() ([]listener, error) { return []listener{{netip.MustParseAddrPort("127.0.0.1:9000"), 77}}, nil }
		}, Options{MetricsListen: "127.0.0.1:9000"}, "port 9000", Broken, "metrics", false, "ebpf"},
		{"the ports are the agent's own", func(h *host) {
			h.listening = func() ([]listener, error) { return []listener{{netip.MustParseAddrPort("[::]:15008"), 77}}, nil }
		}, Options{AgentPID: 77}, "ports", Found, "agent's", true, "ebpf"},
		{"ports unknown", func(h *host) { h.listening = func() ([]listener, error) { return nil, unknown } }, Options{}, "ports", Unknown, "would not tell", true, "ebpf"},
		{"a firewall", func(h *host) { h.rules = func(context.Context) (string, error) { return ":INPUT DROP [0:0]", nil } },
			Options{}, "firewall before port 15008", Warning, "allow TCP port 15008", true, "ebpf"},
		{"a firewall that cannot be read", func(h *host) { h.rules = func(context.Context) (string, error) { return "", unknown } },
			Options{}, "firewall before port 15008", Unknown, "would not tell", true, "ebpf"},
		{"other BPF programs", func(h *host) {
			h.owners = func(string) ([]bpf.Owner, error) {
				return []bpf.Owner{{Name: "rf_connect4", Ringfence: true}, {Name: "cil_sock4", Attach: "connect4", Program: 9}}, nil
			}
		}, Options{}, "other BPF programs", Warning, "cil_sock4 (connect4, id 9)", true, "ebpf"},
		{"our own BPF programs", func(h *host) {
			h.owners = func(string) ([]bpf.Owner, error) { return []bpf.Owner{{Ringfence: true}}, nil }
		}, Options{}, "other BPF programs", Found, "1 of ringfence", true, "ebpf"},
		{"BPF programs unknown", func(h *host) { h.owners = func(string) ([]bpf.Owner, error) { return nil, unknown } },
			Options{}, "other BPF programs", Unknown, "would not tell", true, "ebpf"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := healthy()
			c.amiss(&h)
			if c.options.Capture == "" {
				c.options.Capture = "auto"
			}
			r := examine(t.Context(), c.options, h)
			got := find(t, r, c.check)
			if text := strings.Join([]string{got.Detail, got.Cost, got.Fallback, got.Fix}, "\n"); got.State != c.state || !strings.Contains(text, c.text) {
				t.Errorf("%+v", got)
			}
			if r.OK != c.ok || r.Capture != c.capture {
				t.Errorf("OK %v, capture %s", r.OK, r.Capture)
			}
		})
	}
}

func TestFirewall(t *testing.T) {
	nft := func(rules ...string) string {
		return "table inet filter {\n\tchain input {\n\t\ttype filter hook input priority filter; policy accept;\n\t\t" +
			strings.Join(rules, "\n\t\t") + "\n\t}\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}"
	}
	drop := func(rules ...string) string { return strings.Replace(nft(rules...), "policy accept", "policy drop", 1) }
	for _, c := range []struct {
		name, rules string
		want        bool
	}{
		{"none", "", false},
		{"an open nft", nft(), false},
		{"a forward policy is not ours", nft("ct state established accept"), false},
		{"a policy", drop("tcp dport 22 accept"), true},
		{"a policy with our port", drop("tcp dport 15008 accept"), false},
		{"our port in a list", drop("tcp dport { 22, 15008 } accept"), false},
		{"our port in a range", drop("tcp dport 15000-15010 accept"), false},
		{"a range beside it", drop("tcp dport 15009-15010 accept"), true},
		{"a number that is no port", drop("tcp dport 22 counter packets 15008 bytes 15008 accept"), true},
		{"a source port", drop("tcp sport 15008 accept"), true},
		{"our port refused by name", nft("tcp dport 15008 drop"), true},
		{"our port rejected by name", nft("tcp dport 15008 reject with tcp reset"), true},
		{"all refused at the end", nft("tcp dport 22 accept", "counter packets 1 bytes 2 reject with icmpx admin-prohibited"), true},
		{"dropped at the end", nft("drop"), true},
		{"one source is dropped", nft("ip saddr 192.0.2.1 drop"), false},
		{"ringfence's own chains", drop("jump RINGFENCE_IN tcp dport 15008 accept"), true},
		{"iptables open", ":INPUT ACCEPT [15008:99]\n-A INPUT -p tcp --dport 22 -j ACCEPT", false},
		{"iptables policy", ":INPUT DROP [15008:99]", true},
		{"iptables policy with our port", ":INPUT DROP [0:0]\n-A INPUT -p tcp -m tcp --dport 15008 -j ACCEPT", false},
		{"iptables range", ":INPUT DROP [0:0]\n-A INPUT -p tcp -m tcp --dport 15000:15020 -j ACCEPT", false},
		{"iptables multiport", ":INPUT DROP [0:0]\n-A INPUT -p tcp -m multiport --dports 22,15000:15010 -j ACCEPT", false},
		{"iptables last rule", ":INPUT ACCEPT [0:0]\n-A INPUT -j REJECT --reject-with icmp-host-prohibited", true},
		{"iptables names and drops", ":INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 15008 -j DROP", true},
		{"iptables forward", ":FORWARD DROP [0:0]", false},
		{"numbers beyond all bounds", drop("tcp dport 99999999999999999999999 accept"), true},
	} {
		if got := closes(c.rules); got != c.want {
			t.Errorf("%s: %v\n%s", c.name, got, c.rules)
		}
	}
}

func FuzzFirewall(f *testing.F) {
	f.Add("-A INPUT -p tcp --dports 1:2,3 -j ACCEPT")
	f.Add("type filter hook input priority filter; policy drop;")
	f.Fuzz(func(t *testing.T, rules string) { closes(rules) })
}

// Each way past capture is told for what would really capture here.
func TestBypassTable(t *testing.T) {
	state := func(h host, o Options, name string) State {
		t.Helper()
		return find(t, examine(t.Context(), o, h), name).State
	}
	h := healthy()
	for name, want := range map[string][3]State{ // with ebpf, iptables, observe
		"connect, io_uring, TCP fast open":              {Found, Found, Missing},
		"raw IP sockets":                                {Found, Missing, Missing},
		"rules removed by a program with CAP_NET_ADMIN": {Found, Missing, Missing},
		"UDP, QUIC": {Missing, Missing, Missing},
		"connections open before the scope was added":     {Missing, Missing, Missing},
		"moving a process out of its cgroup (host scope)": {Missing, Missing, Missing},
		"traffic forwarded for another namespace":         {Missing, Missing, Missing},
		"packet, vsock, SMC, XDP and TIPC sockets":        {Missing, Missing, Missing},
		"binding the agent's ports while it is down":      {Found, Found, Missing},
	} {
		for i, capture := range []string{"ebpf", "iptables", "observe"} {
			if got := state(h, Options{Capture: capture}, name); got != want[i] {
				t.Errorf("%s with %s: %s", name, capture, got)
			}
		}
	}
	if c := find(t, examine(t.Context(), Options{}, h), "packet, vsock, SMC, XDP and TIPC sockets"); !strings.Contains(c.Detail, "active") {
		t.Errorf("%+v", c)
	}
	h.lsm = func() (string, error) { return "", os.ErrNotExist }
	if c := find(t, examine(t.Context(), Options{}, h), "packet, vsock, SMC, XDP and TIPC sockets"); !strings.Contains(c.Detail, "lsm=") {
		t.Errorf("%+v", c)
	}
}

func TestReportShape(t *testing.T) {
	data, err := json.Marshal(Report{OK: true, Capture: "ebpf", Checks: []Check{{Group: "host", Name: "root", State: Broken, Cost: "c", Fallback: "f", Fix: "x", Detail: "d"}}})
	want := `{"ok":true,"capture":"ebpf","checks":[{"group":"host","name":"root","state":"broken","detail":"d","cost":"c","fallback":"f","fix":"x"}]}`
	if err != nil || string(data) != want {
		t.Errorf("%s, %v", data, err)
	}
}

// The real host answers every question, in time.
func TestThisHost(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	r := Run(ctx, Options{Capture: "auto", MetricsListen: ln.Addr().String()})
	groups := map[string]int{}
	for _, c := range r.Checks {
		groups[c.Group]++
		if c.Name == "" || c.State == "" || c.State == Broken && c.Fix == "" {
			t.Errorf("%+v", c)
		}
	}
	for _, g := range []string{"kernel", "host", "network", "bypass"} {
		if groups[g] == 0 {
			t.Errorf("nothing about the %s", g)
		}
	}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	if c := find(t, r, "port "+port); c.State != Broken || r.OK {
		t.Errorf("a clash: %+v", c)
	}
}
