package policy_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"ringfence.dev/policy"
)

// example is a block of policies and the block of questions under it.
var example = regexp.MustCompile("(?s)```cedar\n(.*?)```\n```text\n(.*?)```")

// TestReadme runs the examples of README.md: what it says of them holds.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	examples := example.FindAllStringSubmatch(string(text), -1)
	if len(examples) < 12 || len(examples) != strings.Count(string(text), "```cedar") {
		t.Fatalf("%d examples with questions", len(examples))
	}
	for _, x := range examples {
		e := engineOf(t, policy.Config{Dir: write(t, "p.cedar", x[1])})
		for line := range strings.Lines(x[2]) {
			ask, effect, ok := strings.Cut(strings.TrimSpace(line), " => ")
			if !ok {
				t.Fatalf("no answer in %q", line)
			}
			q := parseQuestion(t, ask)
			if d := q.put(t, open(t, e, q.conn)); d.Effect.String() != effect {
				t.Errorf("%s\n%s: got %v (%s)", x[1], line, d.Effect, d.Reason)
			}
		}
	}
}

// The README's words are the schema's.
func TestReadmeNamesTheWords(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	words := regexp.MustCompile(`(?m)^(?:entity|action) (.*?)(?: in .*| appliesTo.*|;| \{)$`)
	for _, m := range words.FindAllStringSubmatch(policy.Schema(), -1) {
		for name := range strings.SplitSeq(m[1], ", ") {
			if name = strings.Trim(name, `"`); !strings.Contains(string(text), "`"+name+"`") {
				t.Errorf("README.md does not name %s", name)
			}
		}
	}
}
