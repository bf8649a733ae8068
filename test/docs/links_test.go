package docs_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestLinks follows every relative link, to its heading if it names one.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, p := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(p.text, -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			path, anchor, _ := strings.Cut(m[1], "#")
			target := p.path
			if path != "" {
				target = filepath.Join(filepath.Dir(p.path), path)
			}
			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s: link to %s: %v", p.path, m[1], err)
				continue
			}
			if anchor != "" && !anchors(read(t, target))[anchor] {
				t.Errorf("%s: link to %s: no such heading", p.path, m[1])
			}
		}
	}
}

// anchors are the names of a page's headings, as code hosts make them.
func anchors(p page) map[string]bool {
	names := map[string]bool{}
	drop := regexp.MustCompile("[^a-z0-9 _-]")
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(p.text, -1) {
		names[strings.ReplaceAll(drop.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
	}
	return names
}

// folders are the top-level folders; each says in a README what it holds.
var folders = []string{"agent", "attest", "bpf", "ca", "cni", "deploy", "policy", "proxy", "test", "tools"}

func TestFoldersHaveREADME(t *testing.T) {
	for _, f := range folders {
		if _, err := os.Stat(filepath.Join(root, f, "README.md")); err != nil {
			t.Errorf("folder %s: %v", f, err)
		}
	}
}

// TestArchitecture checks what ARCHITECTURE.md names against the code: paths,
// BPF programs and tables, types and functions, dependencies.
func TestArchitecture(t *testing.T) {
	p := read(t, "ARCHITECTURE.md")
	source := sources(t)
	for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(p.text, -1) {
		name := m[1]
		switch {
		case regexp.MustCompile(`^(agent|attest|bpf|ca|cni|deploy|policy|proxy|test|tools)(/[a-z0-9_.-]+)+$`).MatchString(name):
			if _, err := os.Stat(filepath.Join(root, name)); err != nil {
				t.Errorf("ARCHITECTURE.md names %s: %v", name, err)
			}
		case regexp.MustCompile(`^(rf_[a-z0-9_]+|RINGFENCE_[A-Z]+)$`).MatchString(name):
			if !strings.Contains(source, name) {
				t.Errorf("ARCHITECTURE.md names %s, which is nowhere in the code", name)
			}
		case regexp.MustCompile(`^[A-Za-z0-9]+(\.[A-Za-z0-9]+)*\.[A-Za-z]+$`).MatchString(name) && !strings.HasSuffix(name, "."+fileType(name)):
			// A name of the code, such as proxy.Relay, Scope.serveTunnel or tunnel.Pool.Get.
			last := name[strings.LastIndexByte(name, '.')+1:]
			if !regexp.MustCompile(`(?m)(^func (\([^)]*\) )?|^type |^\t+)` + last + `\b`).MatchString(source) {
				t.Errorf("ARCHITECTURE.md names %s, which is nowhere declared", name)
			}
		}
	}
}

// fileType returns the ending of a name that is a file's, not one of the code.
func fileType(name string) string {
	for _, ending := range []string{"md", "go", "sh", "json", "yaml", "service"} {
		if strings.HasSuffix(name, "."+ending) {
			return ending
		}
	}
	return "/"
}

// TestDependencies holds the list of dependencies to go.mod, both ways.
func TestDependencies(t *testing.T) {
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) v\S+$`).FindAllStringSubmatch(string(mod), -1) {
		have[m[1]] = true
	}
	for _, cells := range rows(read(t, "ARCHITECTURE.md").section(t, "## Dependencies")) {
		name, ok := code(cells[0])
		if !ok {
			continue
		}
		if !have[name] {
			t.Errorf("ARCHITECTURE.md lists %s, which go.mod does not require directly", name)
		}
		if cells[1] == "" {
			t.Errorf("ARCHITECTURE.md gives no reason for %s", name)
		}
		delete(have, name)
	}
	for name := range have {
		t.Errorf("ARCHITECTURE.md gives no reason for %s", name)
	}
}

// sources is the text of all Go and C files, tests left out.
func sources(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, f := range folders {
		err := filepath.WalkDir(filepath.Join(root, f), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.HasSuffix(path, "_test.go") {
				return err
			}
			if ext := filepath.Ext(path); ext != ".go" && ext != ".c" && ext != ".h" {
				return nil
			}
			data, err := os.ReadFile(path)
			b.Write(data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}
