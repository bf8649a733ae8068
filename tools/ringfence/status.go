package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringfence.dev/agent/admin"
)

func statusCommand(client func() *admin.Client) *cobra.Command {
	var out output
	var watch, collect bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show scopes, workloads, connections, decisions and peers of the running agent",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if collect {
				if err := client().Do(cmd.Context(), "POST", "/v1/memory/collect", nil, nil, nil); err != nil {
					return err
				}
			}
			if watch {
				return watchStatus(cmd.Context(), cmd.OutOrStdout(), client(), out)
			}
			return printStatus(cmd.Context(), cmd.OutOrStdout(), client(), out)
		},
	}
	out.register(cmd)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "redraw every second until interrupted")
	cmd.Flags().BoolVar(&collect, "collect", false, "return unused memory to the system first, to measure what is really used")
	return cmd
}

func printStatus(ctx context.Context, w io.Writer, c *admin.Client, out output) error {
	if out.json() {
		var raw json.RawMessage
		if err := c.Get(ctx, "/v1/status", nil, &raw); err != nil {
			return err
		}
		return writeJSON(w, raw)
	}
	var s admin.Status
	if err := c.Get(ctx, "/v1/status", nil, &s); err != nil {
		return err
	}
	_, err := io.WriteString(w, renderStatus(s, time.Now()))
	return err
}

// watchStatus redraws in place on a terminal and prints one status after another elsewhere.
func watchStatus(ctx context.Context, w io.Writer, c *admin.Client, out output) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		var b strings.Builder
		if err := printStatus(ctx, &b, c, out); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if isTerminal(w) && !out.json() {
			fmt.Fprint(w, "\x1b[H\x1b[2J")
		}
		if _, err := io.WriteString(w, b.String()); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// maxRows keeps a table on a screen; the JSON form has everything.
const maxRows = 20

// renderStatus writes the pages for people; now is when.
func renderStatus(s admin.Status, now time.Time) string {
	var b strings.Builder
	renderHead(&b, s, now)
	table(&b, "SCOPE\tMODE\tPROTECTED\tNAMESPACE\tNOTES", s.Scopes, func(sc admin.Scope) string {
		where := sc.Path
		if sc.Host {
			where = "(host)"
		}
		notes := slices.Clone(sc.Problems)
		if n := len(sc.Uncovered); n > 0 {
			notes = append(notes, fmt.Sprintf("%d connections open since before, uncovered", n))
		}
		return cells(sc.Name, sc.Mode, yesNo(sc.Protected), where, strings.Join(notes, "; "))
	})
	renderLimits(&b, s.Scopes)
	table(&b, "WORKLOAD\tSCOPE\tLISTENING\tIDENTITY", s.Workloads, func(w admin.Workload) string {
		id := w.ID
		if w.Problem != "" {
			id = "! " + w.Problem
		}
		return cells(w.Name, w.Scope, strings.Join(w.Listening, " "), id)
	})
	table(&b, "SEEN\tSCOPE\tDIRECTION\tPEER\tTIMES\tLAST\tNOTE", s.Observations, func(o admin.Observation) string {
		return cells(o.Workload, o.Scope, o.Direction, o.Peer, o.Count, now.Sub(o.Last).Round(time.Second).String()+" ago", o.Note)
	})
	if s.ObservationsForgotten > 0 {
		fmt.Fprintf(&b, "%d pairs that were silent for longest are forgotten\n", s.ObservationsForgotten)
	}
	table(&b, "CONNECTION\tFROM\tTO\tCARRIER\tPROTOCOL\tREQUESTS", s.Connections, func(c admin.Connection) string {
		return cells(c.Decision, either(c.SourceID, c.Source), either(c.DestID, c.Destination), c.Carrier, c.Protocol, c.Requests)
	})
	table(&b, "PEER\tSCOPE\tAGENT\tIDENTITY\tTUNNELS\tSTREAMS", s.Peers, func(p admin.Peer) string {
		return cells(p.Addr, p.Scope, p.Agent, p.ID, p.Tunnels, p.Streams)
	})
	renderRefusals(&b, s.Counters)
	return b.String()
}

func renderHead(b *strings.Builder, s admin.Status, now time.Time) {
	ready := "ready"
	if !s.Ready {
		ready = "NOT READY"
	}
	fmt.Fprintf(b, "%s: host %s, trust domain %s, capture %s (%s), up %s\n",
		ready, s.Host, s.TrustDomain, s.Capture, plain(s.CaptureReason), now.Sub(s.Started).Round(time.Second))
	for _, p := range s.Problems {
		fmt.Fprintf(b, "  ! %s\n", plain(p))
	}
	fmt.Fprintf(b, "decisions: %d permit, %d deny, %d would deny; policies: %d from %s\n",
		s.Decisions.Permit, s.Decisions.Deny, s.Decisions.WouldDeny, s.Policy.Count, plain(s.Policy.Dir))
}

// renderLimits lists what the back end cannot do, once for all scopes that share it.
func renderLimits(b *strings.Builder, scopes []admin.Scope) {
	var order []string
	in := map[string][]string{}
	for _, sc := range scopes {
		for _, l := range sc.Limits {
			if in[l] == nil {
				order = append(order, l)
			}
			in[l] = append(in[l], sc.Name)
		}
	}
	if len(order) == 0 {
		return
	}
	b.WriteString("\nlimits of this capture:\n")
	for _, l := range order {
		fmt.Fprintf(b, "  - %s (%s)\n", plain(l), plain(few(in[l])))
	}
}

// few names some and counts the rest.
func few(names []string) string {
	const most = 3
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// renderRefusals shows what the kernel hooks counted, leaving out what never happened.
func renderRefusals(b *strings.Builder, counters map[string]int64) {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(counters)) {
		if short, ok := strings.CutPrefix(name, "kernel_"); ok && counters[name] > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", plain(short), counters[name]))
		}
	}
	if len(parts) > 0 {
		fmt.Fprintf(b, "\nkernel hooks: %s\n", strings.Join(parts, ", "))
	}
}

func table[T any](b *strings.Builder, head string, rows []T, row func(T) string) {
	if len(rows) == 0 {
		return
	}
	b.WriteByte('\n')
	w := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, head)
	for i, r := range rows {
		if i == maxRows {
			break
		}
		fmt.Fprintln(w, row(r))
	}
	w.Flush()
	if more := len(rows) - maxRows; more > 0 {
		fmt.Fprintf(b, "... and %d more (-o json shows all)\n", more)
	}
}

func yesNo(v bool) string {
	if v {
		return "yes"
	}
	return "no"
}

func either(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// writeJSON writes v indented, with a final newline.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
