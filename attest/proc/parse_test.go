package proc

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ringfence.dev/attest/workload"
)

func stat1(name string) string {
	return "812 (" + name + ") S 1 812 812 0 -1 4194560 1139 0 0 0 3 1 0 0 20 0 1 0 4211 67895296 1466 18446744073709551615 0 0\n"
}

func TestParseStat(t *testing.T) {
	for _, name := range []string{"nginx", "", "a) R 1 (b", ") R 2 3 4", "new\nline", "((", "))"} {
		got, err := parseStat([]byte(stat1(name)))
		want := Stat{Process: workload.Process{PID: 812, StartTime: 42_110_000_000}, Comm: name, State: 'S', Parent: 1}
		if err != nil || got != want {
			t.Errorf("%q: %+v (%v), want %+v", name, got, err, want)
		}
	}
	kthread := strings.Replace(stat1("kworker/0:1"), "4194560", "69238880", 1)
	if got, err := parseStat([]byte(kthread)); err != nil || !got.Kernel {
		t.Errorf("kernel thread: %+v (%v)", got, err)
	}
	for _, bad := range []string{
		"", "812", "812 (x", "812 (x)", ") 812 (x", "(x) S 1", "-1" + stat1("x")[3:], "99999999999" + stat1("x")[3:],
		stat1("x")[:60], strings.Replace(stat1("x"), "4211", "18446744073709551615", 1), strings.Replace(stat1("x"), "4211", "-4", 1),
	} {
		if got, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q accepted as %+v", bad, got)
		}
	}
}

func TestParseStatus(t *testing.T) {
	const rest = "Umask:\t0022\nState:\tS (sleeping)\nUid:\t0\t33\t33\t33\nGid:\t0\t34\t34\t34\nFDSize:\t64\nGroups:\t4 33 \nNStgid:\t812\n"
	want := Status{UID: 0, EUID: 33, GID: 0, EGID: 34, Groups: []uint32{4, 33}}
	// A name may imitate lines, if a kernel did not escape it.
	for _, name := range []string{"nginx", "Uid:\\t0", "Uid:\t7 7 7 7"} {
		got, err := parseStatus([]byte("Name:\t" + name + "\n" + rest))
		if err != nil || cmp.Diff(want, got) != "" {
			t.Errorf("name %q: %v %s", name, err, cmp.Diff(want, got))
		}
	}
	if got, err := parseStatus([]byte("Name:\tx\n" + strings.Replace(rest, "4 33 ", "", 1))); err != nil || len(got.Groups) != 0 {
		t.Errorf("no groups: %+v (%v)", got, err)
	}
	for _, bad := range []string{
		"", "Name:\tx\n", "Name:\tx\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n",
		"Name:\tx\nUid:\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\n",
		"Name:\tx\nUid:\t0\t0\t0\t-1\nGid:\t0\t0\t0\t0\nGroups:\t\n",
		"Name:\tx\n" + rest + "Uid:\t1\t1\t1\t1\n",
	} {
		if got, err := parseStatus([]byte(bad)); err == nil {
			t.Errorf("%q accepted as %+v", bad, got)
		}
	}
}

func TestParseCgroups(t *testing.T) {
	for text, want := range map[string]Cgroups{
		"":                                     {},
		"0::/\n":                               {V2: "/"},
		"0::/system.slice/nginx.service\n":     {V2: "/system.slice/nginx.service"},
		"0::/a:b/c::d\n":                       {V2: "/a:b/c::d"},
		"0::/system.slice/x.service (deleted)": {V2: "/system.slice/x.service", Removed: true},
		"12:cpu,cpuacct:/docker/ab\n1:name=systemd:/system.slice/ssh.service\n0::/system.slice/ssh.service\n": {
			V2: "/system.slice/ssh.service", Systemd: "/system.slice/ssh.service"},
		"3:name=elogind:/1\n": {},
	} {
		if got, err := parseCgroups([]byte(text)); err != nil || got != want {
			t.Errorf("%q: %+v (%v), want %+v", text, got, err, want)
		}
	}
	for _, bad := range []string{"0", "0::", "0::relative\n", "\n", "0::/a\n0::/b\n", "1:name=systemd:/a\n2:name=systemd:/b\n"} {
		if got, err := parseCgroups([]byte(bad)); err == nil {
			t.Errorf("%q accepted as %+v", bad, got)
		}
	}
}

// Whatever a file holds, the parsers return, and what they return is in range.
func FuzzParse(f *testing.F) {
	f.Add([]byte(stat1("x")))
	f.Add([]byte("Name:\tx\nUid:\t1\t1\t1\t1\nGid:\t1\t1\t1\t1\nGroups:\t\n"))
	f.Add([]byte("0::/x\n1:name=systemd:/y\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if st, err := parseStat(text); err == nil && !strings.HasPrefix(strings.TrimSpace(string(text)), fmt.Sprint(st.PID)) && text[0] != '0' && text[0] != '+' {
			t.Errorf("pid %d out of %q", st.PID, text)
		}
		if _, err := parseStatus(text); err == nil && !strings.Contains(string(text), "Uid:") {
			t.Errorf("status out of %q", text)
		}
		if cg, err := parseCgroups(text); err == nil && (cg.V2 != "" && cg.V2[0] != '/' || strings.Contains(cg.V2, "\n")) {
			t.Errorf("%+v out of %q", cg, text)
		}
	})
}
