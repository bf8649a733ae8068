package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"ringfence.dev/agent"
	"ringfence.dev/agent/admin"
)

func scopeCommand(client func() *admin.Client) *cobra.Command {
	cmd := &cobra.Command{Use: "scope", Short: "Add, change and remove what the running agent protects"}
	var sc agent.ScopeConfig
	add := &cobra.Command{
		Use:   "add NAME (--netns PATH | --pid PID | --host)",
		Short: "Protect a network namespace, in watch mode unless told otherwise",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sc.Name = args[0]
			if _, err := sc.Check(); err != nil {
				return &exitError{2, err}
			}
			return client().Do(cmd.Context(), "POST", "/v1/scopes", nil, sc, nil)
		},
	}
	f := add.Flags()
	f.StringVar(&sc.NetNS, "netns", "", "path of the network namespace, such as /run/netns/web")
	f.IntVar(&sc.PID, "pid", 0, "a process in the network namespace")
	f.BoolVar(&sc.Host, "host", false, "the network namespace the agent runs in")
	f.StringVar(&sc.Mode, "mode", "watch", "watch, dry-run or enforce")
	f.StringVar(&sc.Loopback, "loopback", "observe", "enforce, observe or ignore")
	f.StringSliceVar(&sc.Cgroups, "cgroups", nil, "patterns of cgroup paths to cover (host scope only)")
	f.StringSliceVar(&sc.Units, "units", nil, "patterns of systemd units to cover (host scope only)")
	f.StringSliceVar(&sc.ExceptUnits, "except-units", nil, "patterns of systemd units to leave alone (host scope only)")
	f.StringVar(&sc.OnAgentDown, "on-agent-down", "closed", "closed or open: what an enforcing scope does while the agent is dead")
	cmd.AddCommand(add,
		&cobra.Command{
			Use:     "remove NAME",
			Aliases: []string{"rm"},
			Short:   "Stop protecting a scope; its programs go on untouched",
			Args:    cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return ask(cmd, client(), "DELETE", "v1", "scopes", args[0])
			},
		},
		&cobra.Command{
			Use:   "mode NAME watch|dry-run|enforce",
			Short: "Change how far a scope's protection goes",
			Args:  cobra.ExactArgs(2),
			RunE: func(cmd *cobra.Command, args []string) error {
				return ask(cmd, client(), "PUT", "v1", "scopes", args[0], "mode", args[1])
			},
		},
		scopeList(client))
	return cmd
}

func scopeList(client func() *admin.Client) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the scopes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s admin.Status
			if err := client().Get(cmd.Context(), "/v1/status", nil, &s); err != nil {
				return err
			}
			if out.json() {
				return writeJSON(cmd.OutOrStdout(), s.Scopes)
			}
			for _, sc := range s.Scopes {
				fmt.Fprintln(cmd.OutOrStdout(), cells(sc.Name, sc.Mode, "protected: "+yesNo(sc.Protected)))
			}
			return nil
		},
	}
	out.register(cmd)
	return cmd
}

func peerCommand(client func() *admin.Client) *cobra.Command {
	cmd := &cobra.Command{Use: "peer", Short: "What is known of other hosts"}
	cmd.AddCommand(&cobra.Command{
		Use:   "clear ADDRESS",
		Short: "Forget that a host had an agent, so that policy may permit plaintext to it again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return ask(cmd, client(), "DELETE", "v1", "peers", args[0])
		},
	})
	return cmd
}

// ask makes a request whose path names things that the operator wrote.
func ask(cmd *cobra.Command, c *admin.Client, method string, path ...string) error {
	p, err := admin.Path(path...)
	if err != nil {
		return &exitError{2, err}
	}
	return c.Do(cmd.Context(), method, p, nil, nil, nil)
}
