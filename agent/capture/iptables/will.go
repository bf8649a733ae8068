package iptables

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"

	fw "ringfence.dev/cni/iptables"
)

// GuardFD is the descriptor on which a guard process finds its end of the
// connection to the agent.
const GuardFD = 3

// messageLimit bounds one message: rules for ten thousand cgroups fit.
const messageLimit = 4 << 20

var errMessage = errors.New("guard: message is not understood")

// A request goes from the agent to the guard, a reply comes for each, as one
// line of JSON. The agent is the only one that ever begins.
type request struct {
	Op   string `json:"op"` // "arm", "forget" or "beat"
	Will *will  `json:"will,omitempty"`
}

type reply struct {
	// Fired means that the wills were written since the last reply.
	Fired bool   `json:"fired,omitempty"`
	Error string `json:"error,omitempty"`
}

// will is what the guard writes into one scope's namespace when the agent is
// gone. Empty rules mean that all of ours go.
type will struct {
	Scope   string                   `json:"scope"`
	NetNS   string                   `json:"netns,omitempty"` // path, openable while the agent lives
	Variant fw.Variant               `json:"variant,omitempty"`
	Down    map[fw.Family]fw.Ruleset `json:"down,omitempty"`
}

// lines reads one line at a time from a connection with deadlines: what came
// before a deadline is kept for the next call.
type lines struct {
	conn    net.Conn
	pending []byte
}

func (l *lines) next() ([]byte, error) {
	chunk := make([]byte, 4096)
	for {
		if line, rest, ok := bytes.Cut(l.pending, []byte("\n")); ok {
			l.pending = bytes.Clone(rest)
			return line, nil
		}
		if len(l.pending) > messageLimit {
			return nil, errMessage
		}
		n, err := l.conn.Read(chunk)
		l.pending = append(l.pending, chunk[:n]...)
		if n == 0 && err != nil {
			return nil, err
		}
	}
}

func send(conn net.Conn, message any) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if _, err := conn.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("guard: %w", err)
	}
	return nil
}
