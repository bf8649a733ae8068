package attest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// accounts translates ids to names by a file in the form of passwd(5) or
// group(5). No other source is consulted: a directory service on the network
// would be reached through the very connections that are being decided.
type accounts struct {
	path string

	// mu held means names are those of the file as it was at stamp.
	mu    sync.Mutex
	stamp stamp
	names map[uint32]string
}

type stamp struct {
	size int64
	time time.Time
}

// name returns the name of an id; false when the file has none.
func (a *accounts) name(id uint32) (string, bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fi, err := os.Stat(a.path)
	if err != nil {
		return "", false, fmt.Errorf("names of accounts: %w", err)
	}
	if now := (stamp{fi.Size(), fi.ModTime()}); a.names == nil || now != a.stamp {
		text, err := os.ReadFile(a.path)
		if err != nil {
			return "", false, fmt.Errorf("names of accounts: %w", err)
		}
		a.names, a.stamp = parseAccounts(string(text)), now
	}
	name, ok := a.names[id]
	return name, ok, nil
}

// parseAccounts reads name:password:id lines. The first name of an id counts,
// as in getpwuid(3); lines of another form are passed over, as there.
func parseAccounts(text string) map[uint32]string {
	names := make(map[uint32]string)
	for line := range strings.Lines(text) {
		fields := strings.Split(strings.TrimRight(line, "\r\n"), ":")
		if len(fields) < 4 || fields[0] == "" || strings.ContainsAny(fields[0][:1], "#+-") {
			continue
		}
		id, err := strconv.ParseUint(fields[2], 10, 32)
		if _, taken := names[uint32(id)]; err == nil && !taken {
			names[uint32(id)] = fields[0]
		}
	}
	return names
}
