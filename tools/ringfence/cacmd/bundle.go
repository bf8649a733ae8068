package cacmd

import (
	"fmt"

	"github.com/spf13/cobra"

	"ringfence.dev/ca"
	"ringfence.dev/ca/keystore"
)

func bundleCommand(dir *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Show or extend the trust bundle: the roots that peers may chain to",
	}
	cmd.AddCommand(bundleShowCommand(dir), bundleInstallCommand(dir))
	return cmd
}

func bundleShowCommand(dir *string) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Print the trust bundle as SPIFFE bundle (JWKS) or PEM; it holds no secret",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "json" && output != "pem" {
				return fmt.Errorf("output %q: must be json or pem", output)
			}
			b, err := ca.Bundle(*dir)
			if err != nil {
				return err
			}
			data := keystore.EncodeCertificates(b.X509Authorities())
			if output == "json" {
				if data, err = b.Marshal(); err != nil {
					return err
				}
				data = append(data, '\n')
			}
			_, err = cmd.OutOrStdout().Write(data)
			return err
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "json", "json (SPIFFE bundle) or pem")
	return cmd
}

func bundleInstallCommand(dir *string) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "install FILE",
		Short: "Trust further roots: a SPIFFE bundle or PEM certificates (- reads standard input)",
		Long: `Trust further roots of this trust domain: a SPIFFE bundle (JWKS) or PEM
certificates. Roots are added, never taken away, so this can be repeated.
A running agent takes them over within a minute.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			data, opts, err := installInput(cmd, args[0], name)
			if err != nil {
				return err
			}
			added, err := ca.InstallBundle(*dir, data, opts)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%d new roots\n", added)
			return nil
		},
	}
	trustDomainFlag(cmd, &name)
	return cmd
}
