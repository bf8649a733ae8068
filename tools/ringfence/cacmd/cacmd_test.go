package cacmd_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"ringfence.dev/tools/ringfence/cacmd"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ringfence": func() {
		root := &cobra.Command{Use: "ringfence", SilenceErrors: true}
		root.AddCommand(cacmd.Command())
		if err := root.Execute(); err != nil {
			fmt.Fprintln(os.Stderr, "ringfence:", err)
			os.Exit(1)
		}
	}})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata", RequireExplicitExec: true})
}
