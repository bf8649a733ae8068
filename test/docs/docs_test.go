// Package docs_test holds the documents to the truth: commands that they show
// are commands that exist, settings and metrics in their tables are those of the
// code, links lead somewhere, examples are accepted.
//
// It does not run the commands, which change the host: it asks the built
// program whether it would understand them.
package docs_test

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// root is the checkout, seen from this package.
const root = "../.."

// binary is the built command.
var binary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ringfence-docs-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "ringfence")
	build := exec.Command("go", "build", "-o", binary, "./tools/ringfence")
	build.Dir = root
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the command:", err)
		return 1
	}
	return m.Run()
}

// page is one document.
type page struct {
	path   string // below the root
	text   string
	blocks []block
}

// block is one fenced block.
type block struct {
	lang, text string
	line       int // of its first line
}

// documents reads every Markdown file of the checkout.
func documents(t *testing.T) []page {
	t.Helper()
	var pages []page
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path != root && (strings.HasPrefix(name, ".") || name == "bin" || name == "build" || name == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(name) != ".md" {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		pages = append(pages, read(t, rel))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(pages) < 5 {
		t.Fatalf("only %d documents found", len(pages))
	}
	return pages
}

func read(t *testing.T, path string) page {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	p := page{path: path, text: string(data)}
	var open *block
	for i, line := range strings.Split(p.text, "\n") {
		fence, ok := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case ok && open == nil:
			open = &block{lang: fence, line: i + 2}
		case ok:
			p.blocks = append(p.blocks, *open)
			open = nil
		case open != nil:
			open.text += line + "\n"
		}
	}
	if open != nil {
		t.Errorf("%s:%d: a block that is never closed", path, open.line)
	}
	return p
}

// section returns what stands below a heading, up to the next one of the same or a higher level.
func (p page) section(t *testing.T, heading string) string {
	t.Helper()
	level := len(heading) - len(strings.TrimLeft(heading, "#"))
	_, rest, ok := strings.Cut(p.text, "\n"+heading+"\n")
	if !ok {
		t.Fatalf("%s has no %q", p.path, heading)
	}
	end := regexp.MustCompile(fmt.Sprintf(`(?m)^#{1,%d} `, level)).FindStringIndex(rest)
	if end != nil {
		rest = rest[:end[0]]
	}
	return rest
}

// rows returns the cells of each row of the tables in text, heads included.
func rows(text string) [][]string {
	var out [][]string
	for _, line := range strings.Split(text, "\n") {
		line, ok := strings.CutPrefix(strings.TrimSpace(line), "|")
		if !ok || strings.Trim(line, "|-: ") == "" {
			continue
		}
		var cells []string
		for _, c := range strings.Split(strings.TrimSuffix(line, "|"), "|") {
			cells = append(cells, strings.TrimSpace(c))
		}
		out = append(out, cells)
	}
	return out
}

// code returns what a cell that is one code span holds.
func code(cell string) (string, bool) {
	if len(cell) < 3 || cell[0] != '`' || strings.IndexByte(cell[1:], '`') != len(cell)-2 {
		return "", false
	}
	return cell[1 : len(cell)-1], true
}
