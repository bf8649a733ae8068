package policy

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Bounds on what is read: a policy directory is the operator's own, but a
// mistake in it (a log file renamed to .json) shall not exhaust the agent.
const (
	maxFileSize = 1 << 20
	maxFiles    = 1000
)

// Problem is one thing wrong with a policy directory.
type Problem struct {
	File string `json:"file"` // as found: the directory joined with the file's name
	// Line and Col count from one; zero means that the file as a whole is meant. Col counts characters.
	Line int    `json:"line,omitempty"`
	Col  int    `json:"col,omitempty"`
	Text string `json:"problem"`
}

func (p Problem) String() string {
	if p.Line == 0 {
		return p.File + ": " + p.Text
	}
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Col, p.Text)
}

// ProblemsError is the error of a load that found problems. There is at least one.
type ProblemsError struct{ Problems []Problem }

func (e *ProblemsError) Error() string {
	text := "policy: " + e.Problems[0].String()
	if more := len(e.Problems) - 1; more > 0 {
		text += fmt.Sprintf(" (and %d more)", more)
	}
	return text
}

// Check reads the policies in dir as the engine would and returns all that is
// wrong with them, sorted by place; nil means that they would be loaded.
func Check(dir string) []Problem {
	_, err := load(dir)
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*ProblemsError](err); ok {
		return e.Problems
	}
	return []Problem{{File: dir, Text: err.Error()}}
}

// load reads all policies of a directory into a snapshot. All or nothing.
func load(dir string) (*snapshot, error) {
	files, err := listFiles(dir)
	if err != nil {
		return nil, err
	}
	var rules []*rule
	var problems []Problem
	places := make(map[string]string) // id to where it was seen
	for _, name := range files {
		l := &loader{file: name, places: places}
		l.read(filepath.Join(dir, name))
		for i := range l.problems {
			l.problems[i].File = filepath.Join(dir, name)
		}
		rules = append(rules, l.rules...)
		problems = append(problems, l.problems...)
	}
	if len(problems) > 0 {
		slices.SortStableFunc(problems, func(a, b Problem) int {
			return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
		})
		return nil, &ProblemsError{problems}
	}
	return newSnapshot(rules), nil
}

// isPolicyFile tells policies from an editor's temporary files and all else. Hidden
// files are left out because editors and Kubernetes' volumes make their own.
func isPolicyFile(name string) bool {
	ext := filepath.Ext(name)
	return (ext == ".cedar" || ext == ".json") && name[0] != '.' && name[0] != '#' && name[0] != '~'
}

// listFiles returns the names of the policy files in dir, sorted. Symbolic
// links to files count; directories do not.
func listFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("policy: read directory: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if !isPolicyFile(entry.Name()) {
			continue
		}
		info, err := os.Stat(filepath.Join(dir, entry.Name()))
		if errors.Is(err, fs.ErrNotExist) && entry.Type()&fs.ModeSymlink == 0 {
			continue // removed since; a dangling link is an error
		}
		if err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
		if info.IsDir() {
			continue
		}
		names = append(names, entry.Name())
	}
	if len(names) > maxFiles {
		return nil, fmt.Errorf("policy: %s holds %d policy files, more than %d", dir, len(names), maxFiles)
	}
	return names, nil
}

// loader reads one file.
type loader struct {
	file     string
	places   map[string]string
	rules    []*rule
	problems []Problem
}

func (l *loader) problem(line, col int, format string, args ...any) {
	l.problems = append(l.problems, Problem{Line: line, Col: col, Text: fmt.Sprintf(format, args...)})
}

func (l *loader) read(path string) {
	text, err := readFile(path)
	if err != nil {
		l.problem(0, 0, "%v", err)
		return
	}
	// Many editors truncate before they write. An empty file is far more
	// likely half a save than the wish to have no policies in it.
	if len(bytes.TrimSpace(text)) == 0 {
		l.problem(0, 0, "the file is empty")
		return
	}
	if err := tooDeep(text); err != nil {
		l.problem(err.line, err.col, "%s", err.text)
		return
	}
	if strings.HasSuffix(path, ".json") {
		l.json(text)
		return
	}
	l.cedar(text)
}

// readFile reads a regular file of bounded size.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	if info.Size() > maxFileSize {
		return nil, fmt.Errorf("larger than %d bytes", maxFileSize)
	}
	return os.ReadFile(path)
}

// add makes a rule of a parsed policy and files it under its id.
func (l *loader) add(id string, c *candidate) {
	if noted, ok := c.policy.Annotations()[noteID]; ok {
		if id = string(noted); parseID(id) != nil {
			l.problem(c.line, c.col, "%v", parseID(id))
			return
		}
	}
	if before, taken := l.places[id]; taken {
		l.problem(c.line, c.col, "policy id %q is already taken at %s", id, before)
		return
	}
	l.places[id] = fmt.Sprintf("%s:%d:%d", l.file, c.line, c.col)
	r, err := newRule(id, c.policy)
	if err != nil {
		for _, e := range leaves(err) {
			l.problem(c.line, c.col, "policy %s: %v", id, e)
		}
		return
	}
	r.place = l.places[id]
	l.rules = append(l.rules, r)
}

// leaves takes joined errors apart.
func leaves(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, leaves(e)...)
	}
	return all
}
