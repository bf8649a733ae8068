package main

import (
	"fmt"
	"net/url"

	"github.com/spf13/cobra"

	"ringfence.dev/agent/admin"
)

func checkCommand(client func() *admin.Client) *cobra.Command {
	var out output
	var peer, scope string
	cmd := &cobra.Command{
		Use:   "check --peer HOST",
		Short: "Walk the path to another host's agent and say the fix for the first failure",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if peer == "" {
				return &exitError{2, fmt.Errorf("name the other host with --peer")}
			}
			var r admin.CheckReport
			q := url.Values{"peer": {peer}, "scope": {scope}}
			if err := client().Get(cmd.Context(), "/v1/check", q, &r); err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if out.json() {
				if err := writeJSON(w, r); err != nil {
					return err
				}
			} else {
				for _, s := range r.Steps {
					mark := "ok  "
					if !s.OK {
						mark = "FAIL"
					}
					fmt.Fprintf(w, "%s  %-22s %s\n", mark, s.Name, plain(s.Detail))
					if s.Fix != "" {
						fmt.Fprintf(w, "      %-22s %s\n", "to mend it:", plain(s.Fix))
					}
				}
			}
			if !r.OK {
				return &exitError{code: 1}
			}
			return nil
		},
	}
	out.register(cmd)
	cmd.Flags().StringVar(&peer, "peer", "", "address or name of the other host")
	cmd.Flags().StringVar(&scope, "scope", "", "the scope to look from (default: the first)")
	return cmd
}
