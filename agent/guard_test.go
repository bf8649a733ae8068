package agent

import (
	"context"
	"log/slog"
	"os"
)

// runGuardForTest is what `ringfence agent --guard` does.
func runGuardForTest() {
	if err := Guard(context.Background(), slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
		os.Exit(1)
	}
}
