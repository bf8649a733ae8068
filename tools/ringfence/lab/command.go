package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// ExitError asks the program to end with a status of its own, as a shell would
// give: 127 for a command that was not found, 126 for one that cannot be run.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *ExitError) Unwrap() error { return e.Err }

// ExitCode is the status the program should end with.
func (e *ExitError) ExitCode() int { return e.Code }

// Command returns "lab" with its subcommands.
func Command() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Two hosts on this machine, each with an agent, to try ringfence on",
		Long: `The lab makes two hosts on this machine as network namespaces, rf-lab-a (192.0.2.1,
2001:db8::1) and rf-lab-b (192.0.2.2, 2001:db8::2), with an agent each, in one
trust domain. A program run as unit NAME on host a has the identity
spiffe://lab.test/ns/a/sa/NAME.`,
		Example: `  ringfence lab up
  ringfence lab exec b --unit web -- python3 -m http.server 80 &
  ringfence lab exec a --unit shop -- curl http://192.0.2.2/
  ringfence lab exec b -- ringfence status
  ringfence lab down`,
		Args: cobra.NoArgs,
	}
	cmd.PersistentFlags().StringVar(&name, "name", DefaultName, "which lab, where several run side by side")
	cmd.AddCommand(upCommand(&name), execCommand(&name), statusCommand(&name),
		logsCommand(&name), restartCommand(&name), downCommand(&name))
	return cmd
}

func upCommand(name *string) *cobra.Command {
	var o Options
	cmd := &cobra.Command{
		Use: "up", Short: "Make the hosts, and start their agents", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			o.Name = *name
			l, err := Up(ctx, o)
			if err != nil {
				return err
			}
			return writeStatus(cmd.OutOrStdout(), l.Status(ctx))
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Capture, "capture", "auto", "how agents capture: auto, ebpf, iptables; off for hosts without agents")
	f.StringSliceVar(&o.Agents, "agents", []string{"a", "b"}, "which hosts get an agent")
	f.StringVar(&o.Policies, "policies", "", "directory of policies (default: one that permits everything)")
	f.StringVar(&o.Mode, "mode", "enforce", "watch, dry-run or enforce")
	f.StringVar(&o.TrustDomain, "trust-domain", "lab.test", "SPIFFE trust domain")
	return cmd
}

func execCommand(name *string) *cobra.Command {
	var unit string
	cmd := &cobra.Command{
		Use:   "exec a|b [--unit NAME] -- COMMAND...",
		Short: "Run a program on a host",
		Long: `Run a program on a host: in its network namespace and, with --unit, in the cgroup of
that unit, whose name its identity then carries. The program takes the place of
this command, so signals and the exit status are its own.`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			l, err := Open(*name)
			if err != nil {
				return err
			}
			return execFailed(l.Exec(args[0], unit, args[1:]))
		},
	}
	cmd.Flags().StringVar(&unit, "unit", "", "run in the unit of this name")
	return cmd
}

func execFailed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return &ExitError{127, err}
	default:
		return &ExitError{126, err}
	}
}

func statusCommand(name *string) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "status", Short: "What there is of each host", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := Open(*name)
			if err != nil {
				return err
			}
			switch all := l.Status(cmd.Context()); output {
			case "table":
				return writeStatus(cmd.OutOrStdout(), all)
			case "json":
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(all)
			default:
				return fmt.Errorf("output %q is none of table, json", output)
			}
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

func logsCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "logs [a|b]", Short: "The agents' logs", Args: cobra.MaximumNArgs(1), ValidArgs: []string{"a", "b"},
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := Open(*name)
			if err != nil {
				return err
			}
			return l.Logs(cmd.OutOrStdout(), args...)
		},
	}
}

func restartCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "restart a|b", Short: "Stop and start the agent of a host", Args: cobra.ExactArgs(1), ValidArgs: []string{"a", "b"},
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := Open(*name)
			if err != nil {
				return err
			}
			return l.Restart(cmd.Context(), args[0])
		},
	}
}

func downCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Remove the lab, also after a crash; leaves nothing", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return Down(cmd.Context(), *name, "")
		},
	}
}
