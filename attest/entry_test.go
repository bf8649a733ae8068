package attest

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/attest/workload"
)

func TestNewRefuses(t *testing.T) {
	const ok = "spiffe://lab.test/x"
	for name, c := range map[string]struct {
		edit func(*Config)
		says string
	}{
		"no trust domain":       {func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} }, "trust domain"},
		"executables":           {func(c *Config) { c.Executables = "some" }, "executables"},
		"unit root":             {func(c *Config) { c.UnitRoots = []string{"lab"} }, "unit root"},
		"no cgroup v2 there":    {func(c *Config) { c.CgroupMount = "/nonexistent" }, "cgroup"},
		"host too long":         {func(c *Config) { c.Host = strings.Repeat("@", 600) }, "SPIFFE ID"},
		"foreign domain":        {entries("spiffe://other.test/x", "unix:uid:0"), "trust domain"},
		"no path":               {entries("spiffe://lab.test", "unix:uid:0"), "path"},
		"not an ID":             {entries("lab.test/x", "unix:uid:0"), "entry 1"},
		"no selectors":          {entries(ok), "every process"},
		"no value":              {entries(ok, "unix:uid"), "value"},
		"empty value":           {entries(ok, "unix:uid:"), "value"},
		"no type":               {entries(ok, ":uid:0"), "type:value"},
		"unknown key":           {entries(ok, "unix:pid:1"), "unix:pid:1"},
		"unknown type":          {entries(ok, "docker:label:a:b"), "docker"},
		"uid not a number":      {entries(ok, "unix:uid:root"), "decimal"},
		"uid with zero":         {entries(ok, "unix:uid:01"), "decimal"},
		"uid too large":         {entries(ok, "unix:uid:4294967296"), "decimal"},
		"digest too short":      {entries(ok, "unix:sha256:00"), "64"},
		"digest in upper case":  {entries(ok, "unix:sha256:"+strings.Repeat("A", 64)), "64"},
		"the same selectors":    {func(c *Config) { c.Entries = two("unix:uid:0", "unix:uid:0") }, "same selectors"},
		"the same, repeated":    {func(c *Config) { c.Entries = two("unix:uid:0", "unix:uid:0", "unix:uid:0") }, "same selectors"},
		"longer than is usable": {entries("spiffe://lab.test/"+strings.Repeat("x", 2048), "unix:uid:0"), "2048"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := newHost(t).config()
			c.edit(&cfg)
			if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one about %q", err, c.says)
			}
		})
	}
}

func entries(id string, selectors ...string) func(*Config) {
	return func(c *Config) { c.Entries = []Entry{{ID: id, Selectors: selectors}} }
}

// two entries of different IDs: the first with one selector, the second with the others.
func two(first string, second ...string) []Entry {
	return []Entry{{"spiffe://lab.test/one", []string{first}}, {"spiffe://lab.test/two", second}}
}

func TestMatch(t *testing.T) {
	has := []workload.Selector{{Type: "unix", Value: "uid:0"}, {Type: "unix", Value: "gid:0"}, {Type: "systemd", Value: "id:a.service"}}
	for name, c := range map[string]struct {
		entries []Entry
		want    string
		err     error
	}{
		"none":               {nil, "", nil},
		"no match":           {two("unix:uid:1", "unix:gid:1"), "", nil},
		"partial is none":    {two("unix:uid:1", "unix:gid:0", "unix:uid:1"), "", nil},
		"one":                {two("unix:uid:0", "unix:gid:1"), "/one", nil},
		"most selectors":     {two("unix:uid:0", "unix:gid:0", "systemd:id:a.service"), "/two", nil},
		"repetition is none": {two("unix:uid:0", "unix:gid:0", "unix:gid:0"), "", workload.ErrAmbiguous},
		"tie":                {two("unix:uid:0", "unix:gid:0"), "", workload.ErrAmbiguous},
		"tie below the best": {append(two("unix:uid:0", "unix:gid:0"), Entry{"spiffe://lab.test/best", []string{"unix:uid:0", "unix:gid:0"}}), "/best", nil},
		"tie of one ID":      {[]Entry{{"spiffe://lab.test/one", []string{"unix:uid:0"}}, {"spiffe://lab.test/one", []string{"unix:gid:0"}}}, "/one", nil},
	} {
		for _, reversed := range []bool{false, true} {
			es, _, err := checkEntries(testDomain, c.entries)
			if err != nil {
				t.Fatal(name, err)
			}
			if reversed {
				slices.Reverse(es)
			}
			id, found, err := match(es, has)
			if id.Path() != c.want || found != (c.want != "") || !errors.Is(err, c.err) {
				t.Errorf("%s (reversed %v): %s, %v, %v", name, reversed, id, found, err)
			}
			if c.err != nil && (!strings.Contains(err.Error(), "/one") || !strings.Contains(err.Error(), "/two")) {
				t.Errorf("%s: %v does not name both", name, err)
			}
		}
	}
}

func TestAccounts(t *testing.T) {
	h := newHost(t)
	users := &accounts{path: h.root + "/etc/passwd"}
	for id, want := range map[uint32]string{0: "root", 33: "www-data", 34: ""} {
		if got, ok, err := users.name(id); err != nil || got != want || ok != (want != "") {
			t.Errorf("uid %d: %q, %v (%v)", id, got, ok, err)
		}
	}
	h.file("etc/passwd", "admin:x:0:0::/:/bin/sh\nshort:x\n:x:5:5::/:\nbig:x:4294967296:0:::\n")
	if got, _, err := users.name(0); err != nil || got != "admin" {
		t.Errorf("after a change: %q (%v)", got, err)
	}
	if got, ok, _ := users.name(33); ok {
		t.Errorf("removed account is still called %q", got)
	}
	if _, _, err := (&accounts{path: "/nonexistent"}).name(0); err == nil {
		t.Error("a missing file passed for an empty one")
	}
}

func TestLRU(t *testing.T) {
	c := newLRU[int, string](2)
	c.put(1, "a")
	c.put(2, "b")
	c.get(1)
	if out, dropped := c.put(3, "c"); !dropped || out != "b" {
		t.Errorf("dropped %q, %v", out, dropped)
	}
	if out, dropped := c.put(1, "d"); !dropped || out != "a" {
		t.Errorf("replaced %q, %v", out, dropped)
	}
	if _, ok := c.get(2); ok || c.size() != 2 {
		t.Errorf("%d entries", c.size())
	}
	if out := c.removeIf(func(k int) bool { return k == 3 }); len(out) != 1 || c.size() != 1 {
		t.Errorf("removed %v, %d left", out, c.size())
	}
}
