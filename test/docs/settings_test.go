package docs_test

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"ringfence.dev/agent"
	"ringfence.dev/policy"
)

// TestSettings compares the table of settings with the settings that exist.
func TestSettings(t *testing.T) {
	have := map[string]bool{}
	keys(reflect.TypeFor[agent.Config](), "", have)
	documented := map[string]string{}
	for _, cells := range rows(read(t, "docs/operate.md").section(t, "## Settings")) {
		if key, ok := code(cells[0]); ok {
			documented[key] = cells[1]
		}
	}
	for key := range have {
		if _, ok := documented[key]; !ok {
			t.Errorf("setting %s is not documented", key)
		}
	}
	for key := range documented {
		if !have[key] {
			t.Errorf("docs/operate.md documents %s, which is no setting", key)
		}
	}
	for key, want := range defaults(t) {
		if got, _ := code(documented[key]); got != want {
			t.Errorf("docs/operate.md: default of %s is %s, should be `%s`", key, documented[key], want)
		}
	}
}

// keys collects the dotted names of settings. A list of structures counts by itself and by its fields.
func keys(t reflect.Type, prefix string, into map[string]bool) {
	for i := range t.NumField() {
		f := t.Field(i)
		key := prefix + f.Tag.Get("yaml")
		switch {
		case f.Type.Kind() == reflect.Struct:
			keys(f.Type, key+".", into)
		case f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct:
			into[key] = true
			keys(f.Type.Elem(), key+".", into)
		default:
			into[key] = true
		}
	}
}

// defaults are those that do not depend on the machine, as an operator would write them.
func defaults(t *testing.T) map[string]string {
	t.Helper()
	s, err := agent.Config{}.Check()
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Scopes) != 1 {
		t.Fatalf("%d scopes by default, want the host's", len(s.Scopes))
	}
	return map[string]string{
		"instance": s.Instance, "state_dir": s.StateDir, "capture": s.Capture, "policies": s.Policies,
		"scopes.mode": s.Scopes[0].Mode.String(), "scopes.loopback": string(s.Scopes[0].Loopback),
		"scopes.on_agent_down": string(s.Scopes[0].OnAgentDown),
		"admin.socket":         s.AdminSocket, "metrics.listen": s.MetricsListen, "readiness.listen": s.ReadinessListen,
		"decision_log.path":      s.DecisionLog,
		"decision_log.max_bytes": strconv.FormatInt(s.DecisionLogMax, 10),
		"decision_log.require":   strconv.FormatBool(s.RequireLog),
		"svid.ttl":               strings.TrimSuffix(s.SVIDTTL.String(), "0m0s"),
		"http.max_head_bytes":    strconv.Itoa(s.MaxHeadBytes),
		"drain_timeout":          s.DrainTimeout.String(),
		"log_level":              strings.ToLower(s.LogLevel.String()),
	}
}

// TestSettingsExamples puts every example of settings before the agent.
func TestSettingsExamples(t *testing.T) {
	n := 0
	for _, p := range documents(t) {
		for _, b := range p.blocks {
			if b.lang != "yaml" {
				continue
			}
			n++
			if err := accepted([]byte(b.text)); err != nil {
				t.Errorf("%s:%d: %v", p.path, b.line, err)
			}
		}
	}
	if n == 0 {
		t.Error("no document shows settings")
	}
}

// TestInstalledSettings checks the file that is installed, as it is and with all
// that it only mentions put in force.
func TestInstalledSettings(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root, "deploy/agent.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := accepted(data); err != nil {
		t.Errorf("deploy/agent.yaml: %v", err)
	}
	mentioned := regexp.MustCompile(`(?m)^# ([a-z_]+:)`)
	if !mentioned.Match(data) {
		t.Error("deploy/agent.yaml mentions no setting")
	}
	if err := accepted(mentioned.ReplaceAll(data, []byte("$1"))); err != nil {
		t.Errorf("deploy/agent.yaml with its comments in force: %v", err)
	}
}

func accepted(data []byte) error {
	c, err := agent.ParseConfig(data)
	if err != nil {
		return err
	}
	_, err = c.Check()
	return err
}

// TestMetrics compares the table of metrics with those that the agent exports.
func TestMetrics(t *testing.T) {
	source, err := os.ReadFile(filepath.Join(root, "agent/metrics.go"))
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, m := range regexp.MustCompile(`\bdesc\("([a-z_]+)"`).FindAllSubmatch(source, -1) {
		have["ringfence_"+string(m[1])] = true
	}
	if len(have) == 0 {
		t.Fatal("agent/metrics.go defines no metric in the way this test knows")
	}
	for _, cells := range rows(read(t, "docs/operate.md").section(t, "### Metrics")) {
		name, ok := code(cells[0])
		if !ok {
			continue
		}
		if !have[name] {
			t.Errorf("docs/operate.md lists %s, which the agent does not export", name)
		}
		delete(have, name)
	}
	for name := range have {
		t.Errorf("metric %s is not documented", name)
	}
}

// TestPolicies validates the policies in documents other than the guide, whose
// own examples have a test beside them. Those written by a shell count too.
func TestPolicies(t *testing.T) {
	written := regexp.MustCompile(`(?s)policies/\S+\.cedar >/dev/null <<'EOF'\n(.*?)\nEOF\n`)
	n := 0
	for _, p := range documents(t) {
		var found []string
		for _, b := range p.blocks {
			if b.lang == "cedar" {
				found = append(found, b.text)
			}
		}
		for _, m := range written.FindAllStringSubmatch(p.text, -1) {
			found = append(found, m[1])
		}
		for i, text := range found {
			n++
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "example.cedar"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, problem := range policy.Check(dir) {
				t.Errorf("%s, policy %d: %v", p.path, i+1, problem)
			}
		}
	}
	if n < 2 {
		t.Errorf("only %d policies found", n)
	}
}
