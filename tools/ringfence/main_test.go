package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"ringfence": func() {
			os.Exit(run(context.Background(), env{args: os.Args[1:], stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv}))
		},
	})
}

// The command as the operator sees it.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			// No agent of the machine's is asked.
			e.Setenv("RINGFENCE_SOCKET", e.WorkDir+"/none.sock")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"misuse": misuse, "examine": examine},
	})
}

// misuse runs the command, which must end with 2 and nothing on its output.
func misuse(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("ringfence", args...)
	var exit *exec.ExitError
	if neg || !errors.As(err, &exit) || exit.ExitCode() != 2 {
		ts.Fatalf("ringfence %q ended with %v, want exit status 2", args, err)
	}
	if out := ts.ReadFile("stdout"); out != "" {
		ts.Fatalf("misuse, and yet an answer: %s", out)
	}
}

// examine runs doctor, which ends with 0 or 1 as the host it runs on deserves.
func examine(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("ringfence", append([]string{"doctor"}, args...)...)
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		ts.Fatalf("doctor %q: %v", args, err)
	}
	sound := strings.Contains(ts.ReadFile("stdout"), `"ok": true`)
	if strings.Contains(ts.ReadFile("stdout"), `"ok":`) && sound != (err == nil) {
		ts.Fatalf("the report says sound is %v, the exit status %v", sound, err)
	}
}
