package faults_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/test/nettest"
)

// Settings that are wrong are refused before anything is touched, and the key is named.
func TestBadSettings(t *testing.T) {
	nettest.RequireRoot(t)
	a := prepareAgent(t, "settings", nil)
	config := filepath.Join(a.Dir, "agent.yaml")
	for text, says := range map[string]string{
		"instanc: x": "instanc",
		"scopes: [{name: x, host: true, modus: enforce}]":        "modus",
		"scopes: [{name: x, host: true, mode: on}]":              "mode",
		"scopes: [{name: x}]":                                    "exactly one of",
		"scopes: [{name: x, host: true}, {name: x, host: true}]": "twice",
		"scopes: [{name: x, netns: rel}]":                        "absolute",
		"scopes: {name: x}":                                      "line 1",
		"instance: UPPER":                                        "instance",
		"instance: ../../etc":                                    "instance",
		"trust_domain: 'a b'":                                    "trust_domain",
		"host: a/b":                                              "host",
		"capture: magic":                                         "capture",
		"state_dir: here":                                        "state_dir",
		"policies: here":                                         "policies",
		"mesh_networks: [10.0.0.0/33]":                           "mesh_networks",
		"pins: {192.0.2.1: not-an-id}":                           "pins",
		"pins: {nowhere: 'spiffe://a/b'}":                        "pins",
		"entries: [{id: 'spiffe://a/b'}]":                        "selectors",
		"entries: [{id: x, selectors: ['unix:uid:0']}]":          "entries[0]",
		"svid: {ttl: 2d}":                                        "2d",
		"svid: {ttl: -1h}":                                       "svid.ttl",
		"http: {max_head_bytes: 5}":                              "http.max_head_bytes",
		"http: {max_head_bytes: many}":                           "many",
		"drain_timeout: soon":                                    "soon",
		"threads: -1":                                            "threads",
		"log_level: loud":                                        "log_level",
		"admin: {socket: x}":                                     "admin.socket",
		"admin: {socket: /" + strings.Repeat("x", 200) + "}":     "admin.socket",
		"metrics: {listen: nowhere}":                             "metrics.listen",
		"decision_log: {max_bytes: 1}":                           "decision_log.max_bytes",
		"capture: ebpf\ncapture: auto":                           "capture",
		"capture: ebpf\n---\nhost: b":                            "document",
		"\tcapture: ebpf":                                        "settings",
		"capture: [ebpf":                                         "settings",
		"\x00":                                                   "settings",
		"a: &a [*a]":                                             "settings",
	} {
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"agent", "--check"}, {"agent"}, {"agent", "--cleanup"}} {
			out, code := a.command(append(args, "--config", config)...)
			if code != 2 || !strings.Contains(out, says) || strings.Contains(out, "goroutine ") {
				t.Errorf("%v with %q: exit code %d: %s; want 2 and %q", args, text, code, out, says)
				break // never run what was found sound: its defaults mean this machine
			}
		}
	}
	if out, code := a.command("agent", "--check", "--config", config+"-none"); code != 2 {
		t.Errorf("settings that are not there: exit code %d: %s", code, out)
	}
	if err := os.WriteFile(config, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := a.command("agent", "--check", "--config", config); code != 0 {
		t.Errorf("empty settings, which mean the defaults: exit code %d: %s", code, out)
	}
}

const brokenPolicy = `permit (principal, action == Action::"connect", resource) when { context.mash };`

// A policy that is wrong at start ends the start, before anything was captured.
func TestBadPolicyAtStart(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		a := prepareAgent(t, "badstart-"+capture, settings{"capture": capture, "scopes": []scopeSettings{
			{"name": "s", "netns": w.host.Path, "mode": "enforce"},
		}})
		for _, text := range []string{"permit (principal", brokenPolicy, "\xff\xfe\x00"} {
			a.writePolicy(text)
			out, code := a.command("agent", "--config", filepath.Join(a.Dir, "agent.yaml"))
			if code != 1 || !strings.Contains(out, "test.cedar") {
				t.Errorf("policy %q: exit code %d: %s", text, code, out)
			}
			w.passes("thief", job{To: "192.0.2.2:80"}, far)
		}
		w.wantNothingLeft()
		if err := a.Cleanup(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// A policy that is wrong later changes nothing but what status says, until it is
// right again; and an agent that enforces does not start again with it either.
func TestBadPolicyAtReload(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		far := w.listen("192.0.2.2:80")
		a := newAgent(t, settings{"capture": capture, "scopes": []scopeSettings{{"name": "s", "netns": w.host.Path, "mode": "enforce"}}})
		held := launch(t, w.host, "shop", job{To: "192.0.2.2:80", Hold: true})
		if r := held.next(); r.Got != "app" {
			t.Fatal(r)
		}
		far.clients()
		good := a.status().Policy
		for _, how := range []string{"command", "signal", "file"} {
			a.writePolicy(brokenPolicy)
			switch how {
			case "command":
				if out, code := a.command("policy", "reload"); code == 0 || !strings.Contains(out, "test.cedar") {
					t.Errorf("reload of a broken policy: exit code %d: %s", code, out)
				}
			case "signal":
				a.signal(unix.SIGHUP)
			}
			nettest.Wait(t, "status to tell of the broken policy", func() bool { return a.status().Policy.Error != "" })
			if p := a.status().Policy; p.Version != good.Version || p.Count != good.Count {
				t.Errorf("%s: the policies in force are %+v, they were %+v", how, p, good)
			}
			w.passes("shop", job{To: "192.0.2.2:80"}, far)
			w.isRefused("thief", job{To: "192.0.2.2:80"}, far)
			a.writePolicy(basePolicy)
			nettest.Wait(t, "status to be content", func() bool { return a.status().Policy.Error == "" })
		}
		if r := held.goOn(); r.Step != "" {
			t.Errorf("a permitted connection was cut by reloads: %v", r)
		}
	})
}

// A reload ends the connections that are no longer permitted, and no other.
func TestReloadClosesOnlyTheForbidden(t *testing.T) {
	forEachCapture(t, func(t *testing.T, capture string) {
		w := newSite(t)
		w.listen("192.0.2.2:80")
		a := newAgent(t, settings{"capture": capture, "scopes": []scopeSettings{{"name": "s", "netns": w.host.Path, "mode": "enforce"}}})
		const forbid = `@id("no-more") forbid (principal == Workload::"spiffe://faults.test/ns/a/sa/fallen", action, resource);`
		const fallen = `permit (principal == Workload::"spiffe://faults.test/ns/a/sa/fallen", action == Action::"connect", resource);`
		for _, how := range []string{"command", "signal", "file"} {
			a.writePolicy(basePolicy + fallen)
			a.must("policy", "reload")
			shop := launch(t, w.host, "shop", job{To: "192.0.2.2:80", Hold: true})
			gone := launch(t, w.host, "fallen", job{To: "192.0.2.2:80", Hold: true})
			for _, p := range []*proc{shop, gone} {
				if r := p.next(); r.Got != "app" {
					t.Fatalf("%s: %v", how, r)
				}
			}
			a.writePolicy(basePolicy + fallen + forbid)
			switch how {
			case "command":
				a.must("policy", "reload")
			case "signal":
				a.signal(unix.SIGHUP)
			}
			if r := gone.next(); r.Step != "end" || r.Errno != unix.ECONNRESET {
				t.Errorf("%s: the forbidden connection: %v; want a reset", how, r)
			}
			if r := shop.goOn(); r.Step != "" {
				t.Errorf("%s: the permitted connection: %v", how, r)
			}
		}
	})
}
