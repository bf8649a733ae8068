// Package cacmd is the command line of the embedded certificate authority:
// "ringfence ca" and what is below it. It only reads arguments and prints; what
// it does is in package ca.
//
// The invariant: a private key is written to a new file of mode 0600 or into a
// pipe, never over a file and never onto a terminal.
package cacmd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca"
)

// Command returns the command "ca". Errors are returned to the caller, who prints them.
func Command() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Make and share this trust domain's certificate authority",
		Long: `Make and share this trust domain's certificate authority.

A host that is alone needs none of this: the agent makes a CA at its first
start. For two hosts to trust each other, make the CA on one (ca init), make an
intermediate for the other (ca intermediate), and install it there (ca install).`,
		SilenceUsage: true,
	}
	cmd.PersistentFlags().StringVar(&dir, "dir", ca.DefaultDir, "state directory of the CA")
	cmd.AddCommand(initCommand(&dir), intermediateCommand(&dir), installCommand(&dir), statusCommand(&dir), bundleCommand(&dir))
	return cmd
}

func initCommand(dir *string) *cobra.Command {
	var name, output string
	cmd := &cobra.Command{
		Use:   "init --trust-domain TD",
		Short: "Make a root and an intermediate, if there are none",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			td, err := parseTrustDomain(name)
			if err != nil {
				return err
			}
			created, err := ca.Init(*dir, td, ca.Options{Record: recordIn(*dir)})
			if err != nil {
				return err
			}
			return printInit(cmd.OutOrStdout(), *dir, created, output)
		},
	}
	cmd.Flags().StringVar(&name, "trust-domain", "", "SPIFFE trust domain, such as example.org")
	cmd.MarkFlagRequired("trust-domain")
	outputFlag(cmd, &output)
	return cmd
}

func printInit(w io.Writer, dir string, created bool, output string) error {
	a, err := ca.Open(dir, ca.Options{})
	if err != nil {
		return err
	}
	s := a.Status()
	if output == "json" {
		return printJSON(w, struct {
			Created bool `json:"created"`
			ca.Status
		}{created, s})
	}
	if created {
		fmt.Fprintf(w, "made a CA for %s in %s\n", s.TrustDomain, dir)
	} else {
		fmt.Fprintf(w, "a CA for %s is in %s already; nothing was changed\n", s.TrustDomain, dir)
	}
	printStatus(w, s)
	return nil
}

func intermediateCommand(dir *string) *cobra.Command {
	var node, out string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "intermediate --node NAME [--out FILE]",
		Short: "Make an intermediate (key, certificate, roots) for another host",
		Long: `Make an intermediate for another host: one PEM file with its private key, its
certificate and the roots. Whoever has the file can issue any identity of the
trust domain, so copy it over a safe way and delete it:

  ringfence ca intermediate --node b | ssh b ringfence ca install -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Before anything is made, so that no key is made in vain.
			if out == "" && isTerminal(cmd.OutOrStdout()) {
				return errors.New("this would print a private key on the terminal: say --out FILE, or pipe it to: ssh HOST ringfence ca install -")
			}
			data, err := ca.NewIntermediate(*dir, node, ca.Options{IntermediateTTL: ttl, Record: recordIn(*dir)})
			if err != nil {
				return err
			}
			return writeSecret(cmd, out, data)
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "name of the host it is for")
	cmd.Flags().StringVar(&out, "out", "", "file to make (mode 0600), instead of standard output")
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "life of the intermediate, at most a year (default a year)")
	cmd.MarkFlagRequired("node")
	return cmd
}

func installCommand(dir *string) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "install FILE",
		Short: "Install an intermediate that was made on another host (- reads standard input)",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			data, opts, err := installInput(cmd, args[0], name)
			if err != nil {
				return err
			}
			if err := ca.InstallIntermediate(*dir, data, opts); err != nil {
				return err
			}
			a, err := ca.Open(*dir, ca.Options{})
			if err != nil {
				return err
			}
			s := a.Status()
			fmt.Fprintf(cmd.OutOrStdout(), "installed an intermediate of %s in %s\n", s.TrustDomain, *dir)
			printStatus(cmd.OutOrStdout(), s)
			return nil
		},
	}
	trustDomainFlag(cmd, &name)
	return cmd
}

func statusCommand(dir *string) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show this host's intermediate and roots",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := ca.Open(*dir, ca.Options{})
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), a.Status())
			}
			printStatus(cmd.OutOrStdout(), a.Status())
			return nil
		},
	}
	outputFlag(cmd, &output)
	return cmd
}

// installInput reads what is to be installed and the trust domain given with it.
func installInput(cmd *cobra.Command, file, name string) ([]byte, ca.Options, error) {
	opts := ca.Options{}
	if name != "" {
		td, err := parseTrustDomain(name)
		if err != nil {
			return nil, opts, err
		}
		opts.TrustDomain = td
	}
	data, err := readInput(cmd, file)
	return data, opts, err
}

// maxInput bounds what is read from a file or pipe, as the key store does.
const maxInput = 1 << 20

func readInput(cmd *cobra.Command, file string) ([]byte, error) {
	in := cmd.InOrStdin()
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	if err == nil && len(data) > maxInput {
		err = fmt.Errorf("%s is larger than 1 MiB", file)
	}
	return data, err
}

// writeSecret writes to a new file, or to standard output.
func writeSecret(cmd *cobra.Command, path string, data []byte) error {
	if path == "" {
		_, err := cmd.OutOrStdout().Write(data)
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(path)
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "wrote %s: it holds a private key, delete it when it is installed\n", path)
	return nil
}

// recordIn appends to the issuance log beside the CA, opened only when there is
// something to record.
func recordIn(dir string) func(ca.Issuance) error {
	return func(i ca.Issuance) error {
		log, err := ca.OpenLog(filepath.Join(dir, ca.LogName))
		if err != nil {
			return err
		}
		return errors.Join(log.Record(i), log.Close())
	}
}

func parseTrustDomain(name string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return td, fmt.Errorf("trust domain %q: %w", name, err)
	}
	return td, nil
}

func trustDomainFlag(cmd *cobra.Command, name *string) {
	cmd.Flags().StringVar(name, "trust-domain", "", "SPIFFE trust domain, if the certificates do not name it")
}

func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "text", "text or json")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if *output != "text" && *output != "json" {
			return fmt.Errorf("output %q: must be text or json", *output)
		}
		return nil
	}
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func printStatus(w io.Writer, s ca.Status) {
	where := "elsewhere"
	if s.RootHere {
		where = "here"
	}
	fmt.Fprintf(w, "trust domain  %s\n", s.TrustDomain)
	fmt.Fprintf(w, "intermediate  until %s, renew after %s\n", day(s.NotAfter), day(s.RenewAt))
	for _, r := range s.Roots {
		fmt.Fprintf(w, "root          until %s, sha256 %s\n", day(r.NotAfter), r.Fingerprint)
	}
	fmt.Fprintf(w, "root key      %s\n", where)
}

func day(t time.Time) string { return t.UTC().Format(time.DateOnly) }

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && info.Mode()&os.ModeDevice != 0 && f.Name() != os.DevNull
}
