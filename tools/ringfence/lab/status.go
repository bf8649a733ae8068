package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// HostStatus is what there is of one host.
type HostStatus struct {
	Host      string   `json:"host"`
	NetNS     string   `json:"netns"`
	Addresses []string `json:"addresses"`
	// Agent is none, ready, not-ready or dead.
	Agent   string `json:"agent"`
	PID     int    `json:"pid,omitempty"`
	Capture string `json:"capture"`
	Mode    string `json:"mode,omitempty"`
	Socket  string `json:"socket,omitempty"`
	// Units are those with a process in them, Programs counts all processes on the host.
	Units    []string `json:"units"`
	Programs int      `json:"programs"`
}

// Status tells what there is of each host.
func (l *Lab) Status(ctx context.Context) []HostStatus {
	var all []HostStatus
	for _, h := range hosts {
		s := HostStatus{
			Host: h.name, NetNS: l.NetNS(h.name),
			Addresses: []string{h.v4.Addr().String(), h.v6.Addr().String()},
			Agent:     "none", Capture: "off", Units: []string{},
			Programs: len(l.programs(h.name)),
		}
		for unit, pids := range l.units(h.name) {
			if len(pids) > 0 {
				s.Units = append(s.Units, unit)
			}
		}
		slices.Sort(s.Units)
		if a, ok := l.Agent(h.name); ok {
			s.Capture, s.Mode, s.Socket = l.opts.Capture, l.opts.Mode, a.Socket
			s.PID = a.PID()
			s.Agent = agentState(ctx, a, s.PID)
		}
		all = append(all, s)
	}
	return all
}

func agentState(ctx context.Context, a *Agent, pid int) string {
	switch {
	case pid == 0:
		return "dead"
	case a.Ready(ctx) != nil:
		return "not-ready"
	default:
		return "ready"
	}
}

// writeStatus prints the status as a table.
func writeStatus(w io.Writer, all []HostStatus) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "HOST\tADDRESSES\tAGENT\tPID\tCAPTURE\tMODE\tPROGRAMS\tUNITS")
	for _, s := range all {
		pid := "-"
		if s.PID != 0 {
			pid = fmt.Sprint(s.PID)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", s.Host, strings.Join(s.Addresses, " "),
			s.Agent, pid, s.Capture, or(s.Mode, "-"), s.Programs, or(strings.Join(s.Units, " "), "-"))
	}
	return t.Flush()
}

// Logs writes the agents' logs to w, each line with its host before it.
// No names means both hosts.
func (l *Lab) Logs(w io.Writer, names ...string) error {
	if len(names) == 0 {
		names = []string{"a", "b"}
	}
	out := bufio.NewWriter(w)
	for _, name := range names {
		if err := isHost(name); err != nil {
			return err
		}
		f, err := os.Open(l.path(name, "agent.log"))
		if errors.Is(err, os.ErrNotExist) {
			continue // a bare host
		}
		if err != nil {
			return err
		}
		err = prefixLines(out, name+": ", f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return out.Flush()
}

func prefixLines(w *bufio.Writer, prefix string, r io.Reader) error {
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadString('\n')
		if line != "" {
			_, _ = w.WriteString(prefix + strings.TrimSuffix(line, "\n") + "\n") // sticky: Flush reports it
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
