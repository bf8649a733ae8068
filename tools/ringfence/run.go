package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"ringfence.dev/agent/admin"
	"ringfence.dev/tools/ringfence/cacmd"
	"ringfence.dev/tools/ringfence/lab"
)

// env is what the program gets from outside, so that a test can run it.
type env struct {
	args           []string
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
}

// exitError carries an exit code with a text that may be empty.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}
func (e *exitError) Unwrap() error { return e.err }
func (e *exitError) ExitCode() int { return e.code }

// run executes the command line and returns the exit code: 0 success, 1 failure, 2 misuse.
func run(ctx context.Context, e env) int {
	root := command(e)
	root.SetArgs(e.args)
	root.SetIn(e.stdin)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := 1
	var exit interface {
		error
		ExitCode() int
	}
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(e.stderr, "ringfence:", plainLines(text))
	}
	return code
}

func command(e env) *cobra.Command {
	root := &cobra.Command{
		Use:   "ringfence",
		Short: "An identity-based security perimeter around every existing workload",
		Long: "ringfence captures the TCP traffic of unmodified programs, proves who they are,\n" +
			"carries it in mutual TLS and decides every connection and HTTP request by policy.",
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version(),
	}
	socket := e.getenv("RINGFENCE_SOCKET")
	if socket == "" {
		socket = "/run/ringfence/agent.sock"
	}
	root.PersistentFlags().StringVar(&socket, "socket", socket, "the agent's admin socket (also RINGFENCE_SOCKET)")
	client := func() *admin.Client { return admin.NewClient(socket) }
	root.AddCommand(
		agentCommand(),
		statusCommand(client),
		scopeCommand(client),
		explainCommand(client),
		decisionsCommand(client),
		policyCommand(client),
		peerCommand(client),
		doctorCommand(client),
		checkCommand(client),
		cacmd.Command(),
		lab.Command(),
	)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{2, err} })
	strict(root)
	return root
}

// strict makes misuse an error of its own kind everywhere: wrong arguments, and
// words that are no subcommand, which cobra answers with help and success.
func strict(cmd *cobra.Command) {
	args := cmd.Args
	if !cmd.Runnable() {
		args = noSubcommand
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
	if args != nil {
		cmd.Args = func(cmd *cobra.Command, given []string) error {
			if err := args(cmd, given); err != nil {
				return &exitError{2, fmt.Errorf("%w (see `%s --help`)", err, cmd.CommandPath())}
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
}

func noSubcommand(cmd *cobra.Command, given []string) error {
	if len(given) == 0 {
		return nil
	}
	return fmt.Errorf("%q is no command of %s", given[0], cmd.CommandPath())
}

// version is read from the build, so that no release step can forget it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			v += " " + s.Value[:12]
		}
	}
	return v
}

// output says whether the command answers in a table or in JSON.
type output string

func (o *output) register(cmd *cobra.Command) {
	*o = "table"
	cmd.Flags().VarP(o, "output", "o", "table or json")
}

func (o *output) String() string { return string(*o) }
func (o *output) Type() string   { return "format" }
func (o *output) Set(v string) error {
	if v != "table" && v != "json" {
		return fmt.Errorf("%q is neither table nor json", v)
	}
	*o = output(v)
	return nil
}
func (o *output) json() bool { return *o == "json" }

// isTerminal reports whether w is a terminal, where colour and redrawing make sense.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
