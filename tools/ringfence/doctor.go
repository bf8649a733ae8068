package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ringfence.dev/agent"
	"ringfence.dev/agent/admin"
	"ringfence.dev/agent/doctor"
)

func doctorCommand(client func() *admin.Client) *cobra.Command {
	var out output
	var path string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look at this host: what the agent can do here, what is missing, what that costs",
		Long: "doctor tries each capability of the kernel and looks at ports, firewall, clock and other BPF programs.\n" +
			"It changes nothing. The exit code is 1 when protection is impossible until something is mended.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := loadSettings(path, cmd.Flags().Changed("config"))
			if err != nil {
				return &exitError{2, err}
			}
			o := doctor.Options{MetricsListen: s.MetricsListen, ReadinessListen: s.ReadinessListen, Capture: s.Capture, OnlyWatch: s.OnlyWatches()}
			var st admin.Status
			if client().Get(cmd.Context(), "/v1/status", nil, &st) == nil {
				o.AgentPID = st.PID
				if !cmd.Flags().Changed("config") {
					o.Capture = st.Capture // its settings are elsewhere
				}
			}
			r := doctor.Run(cmd.Context(), o)
			if st.PID != 0 {
				r.Checks = append(r.Checks, inUse(st)...)
			}
			if out.json() {
				if err := writeJSON(cmd.OutOrStdout(), r); err != nil {
					return err
				}
			} else {
				printReport(cmd.OutOrStdout(), r)
			}
			if !r.OK {
				return &exitError{code: 1}
			}
			return nil
		},
	}
	out.register(cmd)
	cmd.Flags().StringVar(&path, "config", agent.DefaultConfigPath, "settings file to look for; the default one need not exist")
	return cmd
}

// inUse adds what the running agent knows better than a look from outside.
func inUse(st admin.Status) []doctor.Check {
	checks := []doctor.Check{{Group: "agent", Name: "capture in use", State: doctor.Found, Detail: st.Capture + ": " + st.CaptureReason}}
	for _, p := range st.Problems {
		checks = append(checks, doctor.Check{Group: "agent", Name: "problem", State: doctor.Warning, Detail: p})
	}
	for _, sc := range st.Scopes {
		for _, p := range sc.Problems {
			checks = append(checks, doctor.Check{Group: "agent", Name: "scope " + sc.Name, State: doctor.Warning, Detail: p})
		}
		for _, l := range sc.Limits {
			checks = append(checks, doctor.Check{Group: "agent", Name: "scope " + sc.Name, State: doctor.Found, Detail: "limit: " + l})
		}
		if n := len(sc.Uncovered); n > 0 {
			checks = append(checks, doctor.Check{Group: "agent", Name: "scope " + sc.Name, State: doctor.Warning,
				Detail: fmt.Sprintf("%d connections were open before and are uncovered", n), Fix: "restart the programs that hold them"})
		}
	}
	return checks
}

func printReport(w io.Writer, r doctor.Report) {
	group := ""
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, c := range r.Checks {
		if c.Group != group {
			group = c.Group
			fmt.Fprintf(t, "%s:\n", group)
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\n", c.State, plain(c.Name), plain(c.Detail))
		for _, more := range []struct{ label, text string }{{"costs", c.Cost}, {"instead", c.Fallback}, {"to mend it", c.Fix}} {
			if more.text != "" {
				fmt.Fprintf(t, "  \t  %s:\t%s\n", more.label, plain(more.text))
			}
		}
	}
	t.Flush()
	fmt.Fprintf(w, "\nwith these settings an agent here would capture with: %s\n", r.Capture)
}
