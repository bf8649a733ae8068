package docs_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestCommands asks the program about every command line of it that a document shows.
func TestCommands(t *testing.T) {
	h := helps{}
	n := 0
	for _, p := range documents(t) {
		for where, line := range commandLines(p) {
			for _, words := range simple(line) {
				words = afterPrefixes(words)
				if len(words) == 0 || words[0] != "ringfence" {
					continue
				}
				n++
				if err := h.understands(words[1:]); err != nil {
					t.Errorf("%s: %q: %v", where, line, err)
				}
			}
		}
	}
	if n < 30 {
		t.Errorf("only %d commands found", n)
	}
}

// TestUnderstands holds the test itself to what it claims to find.
func TestUnderstands(t *testing.T) {
	h := helps{}
	for line, ok := range map[string]bool{
		"status --watch":                                 true,
		"status -o json":                                 true,
		"scope mode host enforce":                        true,
		"lab exec a --unit shop -- curl -sS http://b/":   true,
		"lab exec b -- ringfence status":                 true,
		"stats":                                          false,
		"status --wacth":                                 false,
		"status everything":                              false,
		"scope":                                          true,
		"scope modus host enforce":                       false,
		"scope mode host":                                false,
		"lab exec b -- ringfence explian":                false,
		"agent --cleanup --config /etc/x":                true,
		"explain 71918c70ffe9283e84f8ae98-1 --unit shop": true,
	} {
		if err := h.understands(strings.Fields(line)); (err == nil) != ok {
			t.Errorf("%q: %v, want understood: %v", line, err, ok)
		}
	}
}

// commandLines returns the lines of shell blocks, and code spans that are
// commands, by where they stand.
func commandLines(p page) map[string]string {
	lines := map[string]string{}
	for _, b := range p.blocks {
		if b.lang != "sh" {
			continue
		}
		for i, line := range strings.Split(b.text, "\n") {
			lines[fmt.Sprintf("%s:%d", p.path, b.line+i)] = line
		}
	}
	span := regexp.MustCompile("`((?:sudo )?ringfence [^`]+)`")
	for i, line := range strings.Split(p.text, "\n") {
		for k, m := range span.FindAllStringSubmatch(line, -1) {
			lines[fmt.Sprintf("%s:%d (span %d)", p.path, i+1, k+1)] = m[1]
		}
	}
	return lines
}

// simple splits a shell line into simple commands and those into words. Enough
// for documents: quotes group, and a comment ends the line.
func simple(line string) (commands [][]string) {
	var words []string
	var word strings.Builder
	var quote rune
	some := false
	endWord := func() {
		if some {
			words = append(words, word.String())
		}
		word.Reset()
		some = false
	}
	for _, c := range line {
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			} else {
				word.WriteRune(c)
			}
		case c == '\'' || c == '"':
			quote, some = c, true
		case c == '#' && !some:
			endWord()
			return append(commands, words)
		case strings.ContainsRune("|&;>()", c):
			endWord()
			commands, words = append(commands, words), nil
		case c == ' ' || c == '\t':
			endWord()
		default:
			word.WriteRune(c)
			some = true
		}
	}
	endWord()
	return append(commands, words)
}

// afterPrefixes drops what may stand before the program, and the directory it is called by.
func afterPrefixes(words []string) []string {
	for len(words) > 0 && (words[0] == "sudo" || words[0] == "$" || strings.HasPrefix(words[0], "RINGFENCE_SOCKET=")) {
		words = words[1:]
	}
	if len(words) > 2 && words[0] == "ssh" { // ssh HOST COMMAND
		words = words[2:]
	}
	if len(words) > 0 {
		words = append([]string{filepath.Base(words[0])}, words[1:]...)
	}
	return words
}

// helps is what the program said about its subcommands, by their path.
type helps map[string]string

func (h helps) of(path []string) (string, error) {
	key := strings.Join(path, " ")
	if text, ok := h[key]; ok {
		return text, nil
	}
	out, err := exec.Command(binary, append(append([]string{}, path...), "--help")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("ringfence %s --help: %w\n%s", key, err, out)
	}
	h[key] = string(out)
	return h[key], nil
}

var (
	subcommand = regexp.MustCompile(`(?m)^  ([a-z-]+) +\S`)
	usage      = regexp.MustCompile(`(?m)^Usage:\n  ringfence (.*?)(?: \[flags\])?$`)
	required   = regexp.MustCompile(`^[A-Za-z|-]+$`)
)

// understands reports whether the program has such a command, with such flags
// and such a number of arguments.
func (h helps) understands(words []string) error {
	var path []string
	for {
		text, err := h.of(path)
		if err != nil {
			return err
		}
		_, list, group := strings.Cut(text, "Available Commands:\n")
		if !group || len(words) == 0 {
			return h.leaf(path, text, words)
		}
		if words[0] == "--help" || words[0] == "--socket" || words[0] == "..." {
			return nil
		}
		list, _, _ = strings.Cut(list, "\n\n")
		found := false
		for _, m := range subcommand.FindAllStringSubmatch(list, -1) {
			found = found || m[1] == words[0]
		}
		if !found {
			return fmt.Errorf("no command %q below %q", words[0], "ringfence "+strings.Join(path, " "))
		}
		path, words = append(path, words[0]), words[1:]
	}
}

// leaf checks flags and arguments of a command against its own help.
func (h helps) leaf(path []string, text string, words []string) error {
	args := 0
	for i := 0; i < len(words); i++ {
		w := words[i]
		if w == "--" {
			if rest := words[i+1:]; len(rest) > 0 && rest[0] == "ringfence" {
				return h.understands(rest[1:])
			}
			args += len(words) - i - 1
			break
		}
		name, _, inline := strings.Cut(w, "=")
		if !strings.HasPrefix(w, "-") || w == "-" {
			args++
			continue
		}
		m := regexp.MustCompile(`(?m)^ +(?:-\w, +)?` + regexp.QuoteMeta(name) + `( [a-z]+)?(?:,|  )`).FindStringSubmatch(text)
		short := regexp.MustCompile(`(?m)^ +` + regexp.QuoteMeta(name) + `, +--[a-z-]+( [a-z]+)?  `).FindStringSubmatch(text)
		if m == nil {
			m = short
		} else if short != nil && m[1] == "" {
			m = short
		}
		if m == nil {
			return fmt.Errorf("no flag %s", name)
		}
		if m[1] != "" && !inline {
			i++ // its value
		}
	}
	return arguments(path, text, args)
}

// arguments compares a number of arguments with the usage line: what is in
// brackets may be left out, and dots or "--" allow any number.
func arguments(path []string, text string, n int) error {
	m := usage.FindStringSubmatch(text)
	if m == nil {
		return fmt.Errorf("no usage of %q", strings.Join(path, " "))
	}
	line := strings.TrimPrefix(m[1], strings.Join(path, " "))
	if n == 0 && len(path) > 0 && strings.Contains(text, "Available Commands:") {
		return nil // a group is mentioned as such
	}
	line = regexp.MustCompile(`\([^)]*\)|\[?--[a-z-]+ [A-Z]+\]?`).ReplaceAllString(line, "")
	least, most := 0, 0
	for _, w := range strings.Fields(line) {
		switch {
		case strings.HasPrefix(w, "["):
			most++
		case w == "--" || strings.Contains(w, "..."):
			most += 100
		case required.MatchString(w):
			least, most = least+1, most+1
		}
	}
	if n < least && n > 0 || n > most {
		return fmt.Errorf("%d arguments, usage is %q", n, m[1])
	}
	return nil
}

// TestMakeTargets checks that every make command names targets that exist.
func TestMakeTargets(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	span := regexp.MustCompile("`(make [^`]+)`")
	for _, p := range documents(t) {
		var lines []string
		for _, line := range commandLines(p) {
			lines = append(lines, line)
		}
		for _, m := range span.FindAllStringSubmatch(p.text, -1) {
			lines = append(lines, m[1])
		}
		for _, line := range lines {
			for _, words := range simple(line) {
				if words = afterPrefixes(words); len(words) == 0 || words[0] != "make" {
					continue
				}
				for _, w := range words[1:] {
					if strings.ContainsAny(w, "=-/") && !regexp.MustCompile(`^[a-z]+-[a-z]+$`).MatchString(w) {
						continue // a variable, an option or a directory
					}
					if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(w) + `:`).Match(data) {
						t.Errorf("%s: %q: the Makefile has no target %s", p.path, line, w)
					}
				}
			}
		}
	}
}
