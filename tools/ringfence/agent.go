package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"ringfence.dev/agent"
)

func agentCommand() *cobra.Command {
	var path string
	var check, cleanup, guard bool
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run the node agent; without settings it only watches this host and disturbs nothing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if guard {
				// A service manager signals the whole cgroup when the agent dies: that is
				// when the guard has work to do, so it ends by its connection alone.
				return agent.Guard(context.WithoutCancel(cmd.Context()), slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
			}
			s, err := loadSettings(path, cmd.Flags().Changed("config"))
			if err != nil {
				return &exitError{2, err}
			}
			switch {
			case check:
				fmt.Fprintf(cmd.OutOrStdout(), "settings are sound: %d scopes, trust domain %s, host %s\n", len(s.Scopes), s.TrustDomain, s.Host)
				return nil
			case cleanup:
				return agent.Cleanup(cmd.Context(), s)
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: s.LogLevel}))
			return agent.New(s, version(), log).Run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "config", agent.DefaultConfigPath, "settings file; the default one need not exist")
	f.BoolVar(&check, "check", false, "check the settings and exit")
	f.BoolVar(&cleanup, "cleanup", false, "remove everything a stopped agent left in the kernel and exit: its scopes are open afterwards")
	f.BoolVar(&guard, "guard", false, "run the watchdog of a running agent's iptables rules")
	_ = f.MarkHidden("guard") // the agent starts it by itself
	return cmd
}

func loadSettings(path string, named bool) (agent.Settings, error) {
	c, err := agent.LoadConfig(path)
	if err != nil && (named || !errors.Is(err, os.ErrNotExist)) {
		return agent.Settings{}, err
	}
	s, err := c.Check()
	if err != nil {
		return agent.Settings{}, fmt.Errorf("settings %s:\n%w", path, err)
	}
	return s, nil
}
