package main

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
)

// plain makes text fit to be shown on a terminal. Names of programs, paths of
// requests and much else on these pages is chosen by whoever connects: what
// would move the cursor, change colours or begin a line of its own is shown
// as it would be written in a Go string.
func plain(text string) string {
	if strings.IndexFunc(text, unprintable) < 0 {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		if !unprintable(r) {
			b.WriteRune(r)
			continue
		}
		quoted := strconv.QuoteRune(r)
		b.WriteString(quoted[1 : len(quoted)-1])
	}
	return b.String()
}

// plainLines is plain for text of several lines.
func plainLines(text string) string {
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		lines[i] = plain(l)
	}
	return strings.Join(lines, "\n")
}

// unprintable also finds bytes that are no UTF-8, and marks that turn the
// direction of writing.
func unprintable(r rune) bool { return r == unicode.ReplacementChar || !unicode.IsPrint(r) }

// cells makes one row of a table, each value one cell.
func cells(values ...any) string {
	row := make([]string, len(values))
	for i, v := range values {
		row[i] = plain(fmt.Sprint(v))
	}
	return strings.Join(row, "\t")
}
