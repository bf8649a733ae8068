package main

import (
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy"
	"ringfence.dev/policy/decisionlog"
)

// selection chooses recorded decisions.
type selection struct{ unit, scope, effect string }

func (s *selection) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.unit, "unit", "", "only of this calling program: a unit or an executable's name")
	f.StringVar(&s.scope, "scope", "", "only in this scope")
	f.StringVar(&s.effect, "effect", "", "only permit, deny, would_deny, or refused (all but permits)")
}

func (s *selection) query() url.Values {
	return url.Values{"unit": {s.unit}, "scope": {s.scope}, "effect": {s.effect}}
}

func explainCommand(client func() *admin.Client) *cobra.Command {
	var out output
	var sel selection
	var last bool
	cmd := &cobra.Command{
		Use:   "explain [DECISION-ID]",
		Short: "Show a decision, its policies and the first clause that failed in each",
		Long: "explain shows one recorded decision: by its id (from a 403 answer's Ringfence-Decision header,\n" +
			"a log line or `ringfence decisions`), or the newest one that --unit, --scope and --effect choose.\n" +
			"Without an id the newest refusal is shown, with --last the newest decision whatever it was.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := sel.query()
			if len(args) == 1 {
				q.Set("id", args[0])
			} else if !last && sel.effect == "" && sel.unit == "" {
				q.Set("effect", "refused")
			}
			var all []policy.Explanation
			if err := client().Get(cmd.Context(), "/v1/explain", q, &all); err != nil {
				return err
			}
			if out.json() {
				if len(all) == 1 {
					return writeJSON(cmd.OutOrStdout(), all[0])
				}
				return writeJSON(cmd.OutOrStdout(), all)
			}
			for _, e := range all {
				printExplanation(cmd.OutOrStdout(), e)
			}
			return nil
		},
	}
	out.register(cmd)
	sel.register(cmd)
	cmd.Flags().BoolVar(&last, "last", false, "the newest decision, whatever it was")
	return cmd
}

func printExplanation(w io.Writer, e policy.Explanation) {
	r := e.Record
	fmt.Fprintf(w, "%s  %s  %s\n", r.ID, strings.ToUpper(strings.ReplaceAll(r.Effect.String(), "_", " ")), plain(r.Reason))
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(k, v string) {
		if v != "" {
			fmt.Fprintf(t, "  %s\t%s\n", k, plain(v))
		}
	}
	row("time", r.Time.Format("2006-01-02 15:04:05.000"))
	row("scope", fmt.Sprintf("%s (%s, %s)", r.Scope, r.Mode, r.Side))
	row("principal", r.Principal)
	row("caller", caller(r))
	row("action", r.Action)
	row("resource", r.Resource)
	row("from", r.Source.String())
	row("to", r.Destination.String())
	if r.Method != "" {
		row("request", strings.TrimSpace(r.Method+" "+r.Path+" (host "+r.Host+")"))
	}
	row("policies", strings.Join(r.Policies, ", "))
	if r.DryRunEffect != "" {
		row("in dry-run", fmt.Sprintf("%s by %s", r.DryRunEffect, strings.Join(r.DryRunPolicies, ", ")))
	}
	t.Flush()
	if !e.Exact {
		fmt.Fprintf(w, "  (the policies have changed since: explained with version %s)\n", e.Version)
	}
	if e.Note != "" {
		fmt.Fprintf(w, "  %s\n", plain(e.Note))
	}
	for _, p := range e.Policies {
		printPolicy(w, p)
	}
	if more := e.Considered - len(e.Policies); more > 0 {
		fmt.Fprintf(w, "  ... and %d more policies that did not match\n", more)
	}
}

func printPolicy(w io.Writer, p policy.Explained) {
	verdict := "did not match"
	switch {
	case p.Matched && p.Determining:
		verdict = "matched and decided"
	case p.Matched:
		verdict = "matched"
	}
	fmt.Fprintf(w, "\n  %s %q (%s): %s\n", p.Effect, p.ID, plain(p.Place), verdict)
	if reason := p.Annotations["reason"]; reason != "" {
		fmt.Fprintf(w, "    reason: %s\n", plain(reason))
	}
	if p.Clause != "" {
		fmt.Fprintf(w, "    first failing clause, in its %s: %s\n", p.Part, plain(p.Clause))
	}
	for _, v := range p.Values {
		fmt.Fprintf(w, "      %s\n", plain(fmt.Sprint(v)))
	}
	if p.Error != "" {
		fmt.Fprintf(w, "    could not be evaluated: %s\n", plain(p.Error))
	}
}

func caller(r decisionlog.Record) string {
	if r.PID == 0 {
		return ""
	}
	return fmt.Sprintf("%s (pid %d, uid %d)", either(r.Unit, r.Exe), r.PID, r.UID)
}

func decisionsCommand(client func() *admin.Client) *cobra.Command {
	var out output
	var sel selection
	var limit int
	cmd := &cobra.Command{
		Use:   "decisions",
		Short: "List the newest recorded decisions",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q := sel.query()
			q.Set("limit", strconv.Itoa(limit))
			var records []decisionlog.Record
			if err := client().Get(cmd.Context(), "/v1/decisions", q, &records); err != nil {
				return err
			}
			if out.json() {
				return writeJSON(cmd.OutOrStdout(), records)
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(t, "ID\tTIME\tEFFECT\tPRINCIPAL\tACTION\tRESOURCE\tPATH\tREASON")
			for _, r := range records {
				fmt.Fprintln(t, cells(r.ID, r.Time.Format("15:04:05.000"), r.Effect,
					r.Principal, r.Action, r.Resource, r.Path, r.Reason))
			}
			return t.Flush()
		},
	}
	out.register(cmd)
	sel.register(cmd)
	cmd.Flags().IntVarP(&limit, "limit", "n", 100, "at most so many")
	return cmd
}
