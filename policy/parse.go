package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"
)

// candidate is a policy that parsed, and where it begins.
type candidate struct {
	policy    *cedar.Policy
	line, col int
}

// maxDepth bounds how deep brackets and operators nest. The parsers recurse,
// and a Go stack that outgrows its limit ends the program.
const maxDepth = 500

type placedError struct {
	line, col int
	text      string
}

// tooDeep looks for nesting past maxDepth, in Cedar and JSON alike: brackets
// outside of strings and comments, and runs of prefix operators. What else can nest needs
// several words for each level, which the bound on a file's size is enough for.
func tooDeep(text []byte) *placedError {
	depth, run := 0, 0
	for i := 0; i < len(text); i++ {
		switch c := text[i]; c {
		case '!', '-':
			run++
		case ' ', '\t', '\r', '\n':
			continue
		default:
			run = 0
		}
		switch c := text[i]; c {
		case '"':
			for i++; i < len(text) && text[i] != '"' && text[i] != '\n'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		case '/':
			if i+1 < len(text) && text[i+1] == '/' {
				for i < len(text) && text[i] != '\n' {
					i++
				}
			}
		case '(', '[', '{':
			depth++
		case ')', ']', '}':
			depth--
		}
		if depth > maxDepth || run > maxDepth {
			line, col := place(text, i)
			return &placedError{line, col, fmt.Sprintf("nested more than %d deep", maxDepth)}
		}
	}
	return nil
}

// place turns a byte offset into line and column, both from one.
func place(text []byte, offset int) (line, col int) {
	before := text[:min(max(offset, 0), len(text))]
	line = bytes.Count(before, []byte("\n")) + 1
	return line, utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:]) + 1
}

// where finds the place in the text of a parser's error, which is the only
// form the parser gives it in. Missing it costs the place, nothing else.
var where = regexp.MustCompile(`^(?:parser error: )?(?:parse error at )?[^ ]*?:(\d+):(\d+):? `)

func (l *loader) cedar(text []byte) {
	if !utf8.Valid(text) {
		l.problem(0, 0, "not UTF-8")
		return
	}
	policies, err := cedar.NewPolicyListFromBytes(l.file, text)
	if err != nil {
		line, col, text := 0, 0, err.Error()
		if m := where.FindStringSubmatch(text); m != nil {
			line, _ = strconv.Atoi(m[1])
			col, _ = strconv.Atoi(m[2])
			text = "syntax error at " + text[len(m[0]):]
		}
		l.problem(line, col, "%s", text)
		return
	}
	for i, p := range policies {
		at := p.Position()
		l.add(l.file+"#"+strconv.Itoa(i+1), &candidate{p, at.Line, at.Column})
	}
}

// json reads Cedar's JSON policy set: {"staticPolicies": {"<id>": {...}}}. It walks
// the two outer levels itself, to know where each policy stands and to see a
// key that occurs twice, of which one would silently be lost.
func (l *loader) json(text []byte) {
	if err := l.jsonSet(text); err != nil {
		offset := int64(0)
		if e, ok := errors.AsType[*json.SyntaxError](err); ok {
			offset = e.Offset
		} else if e, ok := errors.AsType[*offsetError](err); ok {
			offset = e.offset
		}
		line, col := place(text, int(offset))
		l.problem(line, col, "%v", err)
	}
}

type offsetError struct {
	offset int64
	text   string
}

func (e *offsetError) Error() string { return e.text }

func (l *loader) jsonSet(text []byte) error {
	if err := json.Unmarshal(text, new(any)); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	found := false
	err := eachMember(dec, func(key string, at int64) error {
		switch key {
		case "staticPolicies":
			found = true
			return eachMember(dec, func(id string, at int64) error { return l.jsonPolicy(dec, text, id) })
		case "templates", "templateLinks":
			return emptyMember(dec, key, at)
		}
		return &offsetError{at, fmt.Sprintf("unknown key %q", key)}
	})
	if err == nil && !found {
		err = &offsetError{0, `no "staticPolicies"`}
	}
	return err
}

func (l *loader) jsonPolicy(dec *json.Decoder, text []byte, id string) error {
	var raw json.RawMessage
	if err := dec.Decode(&raw); err != nil {
		return err
	}
	line, col := place(text, int(dec.InputOffset())-len(raw))
	if err := parseID(id); err != nil {
		l.problem(line, col, "%v", err)
		return nil
	}
	var p cedar.Policy
	if err := p.UnmarshalJSON(raw); err != nil {
		l.problem(line, col, "policy %s: %v", id, err)
		return nil
	}
	l.add(l.file+"#"+id, &candidate{&p, line, col})
	return nil
}

func emptyMember(dec *json.Decoder, key string, at int64) error {
	var raw json.RawMessage
	if err := dec.Decode(&raw); err != nil {
		return err
	}
	switch string(bytes.Join(bytes.Fields(raw), nil)) {
	case "{}", "[]", "null":
		return nil
	}
	return &offsetError{at, key + " are not supported"}
}

// eachMember reads a JSON object and calls do before each value, which do must consume.
func eachMember(dec *json.Decoder, do func(key string, at int64) error) error {
	if tok, err := dec.Token(); err != nil {
		return err
	} else if tok != json.Delim('{') {
		return &offsetError{dec.InputOffset(), "not a JSON object"}
	}
	seen := make(map[string]bool)
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return err
		}
		key, at := tok.(string), dec.InputOffset()
		if seen[key] {
			return &offsetError{at, fmt.Sprintf("key %q occurs twice", key)}
		}
		seen[key] = true
		if err := do(key, at); err != nil {
			return err
		}
	}
	if _, err := dec.Token(); err != nil && err != io.EOF {
		return err
	}
	return nil
}
