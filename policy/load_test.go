package policy_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ringfence.dev/policy"
)

func TestCheckFindsEveryProblem(t *testing.T) {
	const json = `{"staticPolicies": {%s}}`
	const ok = `{"effect":"permit","principal":{"op":"All"},"action":{"op":"All"},"resource":{"op":"All"},"conditions":[]}`
	for _, tc := range []struct{ name, file, text, want string }{
		{"syntax", "a.cedar", "permit(principal, action, resource);\npermit(principal action, resource);", `^a.cedar:2:24: syntax error at ",": `},
		{"unterminated", "a.cedar", `permit(principal, action, resource)`, `^a.cedar:1:\d+: .*`},
		{"string", "a.cedar", `@id("x`, `^a.cedar:1:\d+: .*`},
		{"half a save", "a.cedar", "", `^a.cedar: the file is empty`},
		{"half a save, json", "a.json", " \n", `^a.json: the file is empty`},
		{"binary", "a.cedar", "\xff\xfe", `^a.cedar: not UTF-8`},
		{"deep", "a.cedar", `permit(principal, action, resource) when { ` + strings.Repeat("(", 100_000), `nested more than 500 deep`},
		{"negations", "a.cedar", `permit(principal, action, resource) when { ` + strings.Repeat("! ", 100_000), `nested more than 500 deep`},
		{"deep json", "a.json", strings.Repeat("[", 100_000), `nested more than 500 deep`},
		{"entity type", "a.cedar", "\n  permit(principal == User::\"x\", action, resource);", `^a.cedar:2:3: policy a.cedar#1: .*User`},
		{"action", "a.cedar", `permit(principal, action == Action::"FETCH", resource);`, `unrecognized action`},
		{"attribute", "a.cedar", `permit(principal, action == Action::"GET", resource) when { context.request.nope };`, `nope`},
		{"request on connect", "a.cedar", `permit(principal, action, resource) when { context.request.path == "/" };`, `request`},
		{"optional", "a.cedar", `permit(principal is Workload, action, resource) when { principal.name == "x" };`, `optional attribute`},
		{"type", "a.cedar", `permit(principal, action == Action::"connect", resource) when { resource.port == "80" };`, `.`},
		{"inapplicable", "a.cedar", `permit(principal, action == Action::"egress", resource == Service::"x");`, `applicable action`},
		{"mode", "a.cedar", `@mode("audit") permit(principal, action, resource);`, `@mode is "audit"`},
		{"mode's case", "a.cedar", `@Mode("dry-run") permit(principal, action, resource);`, `must be written @mode`},
		{"severity", "a.cedar", `@severity("bad") permit(principal, action, resource);`, `@severity`},
		{"empty id", "a.cedar", `@id permit(principal, action, resource);`, `policy id ""`},
		{"id", "a.cedar", `@id("a b") permit(principal, action, resource);`, `policy id "a b"`},
		{"same id", "a.cedar", `@id("x") permit(principal, action, resource); @id("x") forbid(principal, action, resource);`, `^a.cedar:1:47: policy id "x" is already taken at a.cedar:1:1`},
		{"id of another", "a.cedar", `permit(principal, action, resource); @id("a.cedar#1") forbid(principal, action, resource);`, `already taken`},
		{"endpoint", "a.cedar", `permit(principal, action, resource == Endpoint::"x /y");`, `not of the form`},
		{"endpoint's method", "a.cedar", `permit(principal, action, resource == Endpoint::"x G/T /y");`, `no method`},
		{"endpoint's template", "a.cedar", `permit(principal, action, resource == Endpoint::"x GET y");`, `begin with a slash`},
		{"endpoint's rest", "a.cedar", `permit(principal, action, resource == Endpoint::"x GET /{a...}/b");`, `must come last`},
		{"endpoint's parameter", "a.cedar", `permit(principal, action, resource == Endpoint::"x GET /{}");`, `parameter name`},
		{"endpoint's segment", "a.cedar", `permit(principal, action, resource == Endpoint::"x GET /a/../b");`, `canonical`},
		{"workload", "a.cedar", `forbid(principal == Workload::"curl", action, resource);`, `Workload::"curl" can never match`},
		{"service", "a.cedar", `forbid(principal, action, resource in Service::"nginx");`, `neither a SPIFFE ID nor address:port`},
		{"service's form", "a.cedar", `forbid(principal, action, resource == Service::"[2001:DB8::0]:80");`, `write it \[2001:db8::\]:80`},
		{"service's id", "a.cedar", `forbid(principal, action, resource == Service::"spiffe://Lab.test/x");`, `can never match`},
		{"mapped address", "a.cedar", `forbid(principal == Anonymous::"::ffff:192.0.2.1", action, resource);`, `write it 192.0.2.1`},
		{"anonymous", "a.cedar", `forbid(principal == Anonymous::"", action, resource);`, `not an IP address`},
		{"address", "a.cedar", `forbid(principal, action, resource in Address::"192.0.2.0/24");`, `can never match`},
		{"trust domain", "a.cedar", `forbid(principal in TrustDomain::"spiffe://lab.test", action, resource);`, `bare name`},
		{"namespace", "a.cedar", `forbid(principal in Namespace::"a", action, resource);`, `not of the form`},
		{"namespace's form", "a.cedar", `forbid(principal in Namespace::"spiffe://lab.test/ns/a/sa", action, resource);`, `not of the form`},
		{"external host", "a.cedar", `forbid(principal, action, resource == ExternalHost::"example.org:443");`, `can never match`},
		{"in a condition", "a.cedar", `forbid(principal, action, resource) when { principal == Workload::"x" };`, `can never match`},
		{"endpoint in a condition", "a.cedar", `forbid(principal, action == Action::"GET", resource) when { resource == Endpoint::"spiffe://lab.test/x GET /" };`, `resource scope`},
		{"endpoint's service", "a.cedar", `forbid(principal, action, resource == Endpoint::"shop GET /");`, `Service::"shop" can never match`},
		{"template", "a.cedar", `permit(principal == ?principal, action, resource);`, `^a.cedar:1:\d+:`},
		{"json syntax", "a.json", "{\n \"staticPolicies\": {,}}", `^a.json:2:\d+: `},
		{"json trailing", "a.json", fmt.Sprintf(json, "") + "{}", `^a.json:1:\d+: `},
		{"json list", "a.json", "[]", `not a JSON object`},
		{"json null", "a.json", "null", `not a JSON object`},
		{"json empty", "a.json", "{}", `no "staticPolicies"`},
		{"json null set", "a.json", `{"staticPolicies": null}`, `not a JSON object`},
		{"json unknown key", "a.json", `{"staticPolicies": {}, "x": 1}`, `unknown key "x"`},
		{"json templates", "a.json", `{"staticPolicies": {}, "templates": {"t": {}}}`, `templates are not supported`},
		{"json links", "a.json", `{"staticPolicies": {}, "templateLinks": [{}]}`, `templateLinks are not supported`},
		{"json twice", "a.json", fmt.Sprintf(json, `"a": `+ok+`, "a": `+ok), `key "a" occurs twice`},
		{"json id", "a.json", fmt.Sprintf(json, `"a b": `+ok), `policy id "a b"`},
		{"json policy", "a.json", "{\"staticPolicies\": {\n\n  \"a\": {\"effect\": \"maybe\"}}}", `^a.json:3:8: policy a: `},
		{"json policy null", "a.json", fmt.Sprintf(json, `"a": null`), `policy a: `},
		{"json slot", "a.json", fmt.Sprintf(json, `"a": {"effect":"permit","principal":{"op":"==","slot":"?principal"},"action":{"op":"All"},"resource":{"op":"All"}}`), `.`},
		{"json condition", "a.json", fmt.Sprintf(json, `"a": {"effect":"permit","principal":{"op":"All"},"action":{"op":"All"},"resource":{"op":"All"},"conditions":[{"kind":"if","body":{"Value":true}}]}`), `.`},
		{"json literal", "a.json", fmt.Sprintf(json, `"a": {"effect":"permit","principal":{"op":"==","entity":{"type":"Workload","id":"x"}},"action":{"op":"All"},"resource":{"op":"All"},"conditions":[]}`), `can never match`},
		{"json validation", "a.json", fmt.Sprintf(json, `"a": {"effect":"permit","principal":{"op":"is","entity_type":"User"},"action":{"op":"All"},"resource":{"op":"All"},"conditions":[]}`), `User`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := write(t, tc.file, tc.text)
			problems := policy.Check(dir)
			if len(problems) == 0 {
				t.Fatal("no problem found")
			}
			text := strings.TrimPrefix(problems[0].String(), dir+"/")
			if !regexp.MustCompile(tc.want).MatchString(text) {
				t.Errorf("got %s, want %s", text, tc.want)
			}
			_, err := policy.New(policy.Config{Dir: dir})
			if pe, ok := errors.AsType[*policy.ProblemsError](err); !ok || len(pe.Problems) != len(problems) {
				t.Errorf("the engine says %v", err)
			}
		})
	}
}

func TestCheckReportsAllFilesInOrder(t *testing.T) {
	dir := write(t,
		"b.cedar", "permit(", "a.cedar", "@mode(\"x\") @severity(\"y\") permit(principal == User::\"u\", action, resource);",
		"c.cedar", permitAll)
	problems := policy.Check(dir)
	if len(problems) != 5 {
		t.Fatalf("got %v", problems)
	}
	for i, file := range []string{"a.cedar", "a.cedar", "a.cedar", "a.cedar", "b.cedar"} {
		if problems[i].File != filepath.Join(dir, file) {
			t.Errorf("problem %d is %v", i, problems[i])
		}
	}
	if policy.Check(filepath.Join(dir, "absent")) == nil {
		t.Error("a missing directory has no problem")
	}
	if p := policy.Check(t.TempDir()); p != nil {
		t.Errorf("an empty directory has problems: %v", p)
	}
}

func TestOnlyPolicyFilesAreRead(t *testing.T) {
	dir := write(t, "a.cedar", permitAll)
	for _, name := range []string{"README.md", ".b.cedar", ".b.cedar.swp", "b.cedar~", "#b.cedar#", "~b.cedar", "b.cedar.tmp", "b.cedar.orig", "4913"} {
		put(t, filepath.Join(dir, name), "not a policy")
	}
	if err := os.Mkdir(filepath.Join(dir, "dir.cedar"), 0o700); err != nil {
		t.Fatal(err)
	}
	if p := policy.Check(dir); p != nil {
		t.Fatal(p)
	}
	if n := engineOf(t, policy.Config{Dir: dir}).Status().Policies; n != 1 {
		t.Errorf("%d policies", n)
	}
}

func TestHostileFiles(t *testing.T) {
	dir := write(t, "a.cedar", permitAll)
	link := filepath.Join(dir, "z.cedar")
	if err := os.Symlink(filepath.Join(dir, "absent"), link); err != nil {
		t.Fatal(err)
	}
	// A dangling link must not pass for a directory that is not there yet.
	if _, err := policy.New(policy.Config{Dir: dir}); err == nil {
		t.Error("a dangling link was ignored")
	}
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", link); err != nil {
		t.Fatal(err)
	}
	if p := policy.Check(dir); len(p) != 1 || p[0].Text != "not a regular file" {
		t.Errorf("device: %v", p)
	}
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	put(t, link, strings.Repeat("//\n", 400_000))
	if p := policy.Check(dir); len(p) != 1 || !strings.Contains(p[0].Text, "larger than") {
		t.Errorf("large: %v", p)
	}
}

func TestVersionIsOfMeaning(t *testing.T) {
	version := func(files ...string) string { return engineOf(t, policy.Config{Dir: write(t, files...)}).Version() }
	base := version("a.cedar", `@id("x") @reason("r") permit(principal, action, resource);`)
	same := version("b.cedar", "// comment\n@reason(\"r\")\n@id(\"x\")\npermit(\n  principal,\n  action, resource);\n")
	if base != same {
		t.Error("layout changed the version")
	}
	for _, text := range []string{
		`@id("y") @reason("r") permit(principal, action, resource);`,
		`@id("x") @reason("s") permit(principal, action, resource);`,
		`@id("x") @reason("r") @mode("dry-run") permit(principal, action, resource);`,
		`@id("x") @reason("r") forbid(principal, action, resource);`,
		`@id("x") @reason("r") permit(principal, action, resource) when { true };`,
	} {
		if version("a.cedar", text) == base {
			t.Errorf("same version for %s", text)
		}
	}
	json := `{"staticPolicies": {"x": {"effect":"permit","principal":{"op":"All"},"action":{"op":"All"},"resource":{"op":"All"},
		"annotations":{"id":"x","reason":"r","owner":"o","zone":"z"},
		"conditions":[{"kind":"when","body":{"==":{"left":{"Record":{"a":{"Value":1},"b":{"Value":2},"c":{"Value":3}}},"right":{"Record":{"a":{"Value":1},"b":{"Value":2},"c":{"Value":3}}}}}}]}}}`
	first := version("a.json", json)
	for range 20 {
		if v := version("a.json", json); v != first {
			t.Fatal("the version of JSON policies differs from load to load")
		}
	}
}

func TestPolicyIDs(t *testing.T) {
	e := engineOf(t, policy.Config{Dir: write(t,
		"shop.cedar", `forbid(principal, action, resource) when { !context.mesh }; @id("named") permit(principal, action, resource);`,
		"x.json", `{"staticPolicies": {"k": {"effect":"permit","principal":{"op":"All"},"action":{"op":"All"},"resource":{"op":"All"},"conditions":[]}}, "templates": {}, "templateLinks": []}`)})
	d := connect(t, open(t, e, meshed(curl, nginx)))
	if got := fmt.Sprint(d.Policies); got != "[named x.json#k]" {
		t.Errorf("permit: %s", got)
	}
	c := meshed(curl, nginx)
	c.Mesh = false
	if d = connect(t, open(t, e, c)); fmt.Sprint(d.Policies) != "[shop.cedar#1]" {
		t.Errorf("forbid: %v", d.Policies)
	}
}
