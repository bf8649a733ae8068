package main

import (
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"ringfence.dev/agent/admin"
	"ringfence.dev/policy"
)

func policyCommand(client func() *admin.Client) *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Print the schema, check policies, reload them"}
	cmd.AddCommand(
		&cobra.Command{
			Use:   "schema",
			Short: "Print the Cedar schema that policies are validated against",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				_, err := io.WriteString(cmd.OutOrStdout(), policy.Schema())
				return err
			},
		},
		policyCheck(),
		&cobra.Command{
			Use:   "reload",
			Short: "Make the running agent load its policy directory anew",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return client().Do(cmd.Context(), "POST", "/v1/policy/reload", nil, nil, nil)
			},
		})
	return cmd
}

func policyCheck() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "check DIR",
		Short: "Read and validate a policy directory as the agent would, without an agent",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			problems := policy.Check(args[0])
			w := cmd.OutOrStdout()
			if out.json() {
				if problems == nil {
					problems = []policy.Problem{}
				}
				if err := writeJSON(w, problems); err != nil {
					return err
				}
			} else {
				for _, p := range problems {
					fmt.Fprintln(w, p)
				}
				switch {
				case len(problems) > 0:
				case empty(args[0]):
					fmt.Fprintln(w, "there is no policy: an enforcing scope refuses everything")
				default:
					fmt.Fprintln(w, "all policies are sound")
				}
			}
			if len(problems) > 0 {
				return &exitError{code: 1}
			}
			return nil
		},
	}
	out.register(cmd)
	return cmd
}

// empty reports whether a directory holds no policy files.
func empty(dir string) bool {
	for _, pattern := range []string{"*.cedar", "*.json"} {
		if found, _ := filepath.Glob(filepath.Join(dir, pattern)); len(found) > 0 {
			return false
		}
	}
	return true
}
