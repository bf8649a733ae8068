// Command demo shows what ringfence does, with real programs on two hosts that
// it makes for the occasion. Each step asserts what it says before it says it:
// a line that is printed is true.
//
// It needs root, nginx, curl, redis-server and redis-tools, takes less than a
// minute, and leaves nothing behind, interrupted or not.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case interrupted:
		fmt.Fprintln(os.Stderr, "demo: interrupted; everything it made is gone again", leftover(err))
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// leftover is what an interrupted demo must still say: that it could not clean up.
func leftover(err error) string {
	var c *cleanupError
	if errors.As(err, &c) {
		return "except: " + c.Error()
	}
	return ""
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	f := flag.NewFlagSet("demo", flag.ContinueOnError)
	f.SetOutput(out)
	mode := f.String("mode", or(os.Getenv("MODE"), "auto"), "how to capture: auto, ebpf or iptables (also MODE in the environment)")
	binary := f.String("binary", "bin/ringfence", "the ringfence command to show")
	if err := f.Parse(args); err != nil {
		return err
	}
	if !slices.Contains([]string{"auto", "ebpf", "iptables"}, *mode) || f.NArg() > 0 {
		return fmt.Errorf("mode %q is none of auto, ebpf, iptables", *mode)
	}
	if err := requirements(*binary); err != nil {
		return err
	}
	path, err := filepath.Abs(*binary)
	if err != nil {
		return err
	}
	began := time.Now()
	show := newShow(out)
	s, err := raise(ctx, path, *mode)
	if err != nil {
		return err
	}
	defer func() {
		if e := s.strike(); e != nil {
			err = errors.Join(err, &cleanupError{e})
		}
		if err == nil {
			show.end(time.Since(began))
		}
	}()
	return s.play(ctx, show)
}

// cleanupError reports something the demo could not remove.
type cleanupError struct{ error }

func (e *cleanupError) Unwrap() error { return e.error }

// packages names the Debian package of each program the demo runs.
var packages = map[string]string{
	"nginx": "nginx-light", "curl": "curl", "redis-server": "redis-server", "redis-cli": "redis-tools",
}

// requirements reports everything that is missing at once.
func requirements(binary string) error {
	// Debian's users have no sbin in their PATH, and sudo may keep theirs.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("needs root: it makes network namespaces and loads programs into the kernel"))
	}
	for program, pkg := range packages {
		if _, err := exec.LookPath(program); err != nil {
			errs = append(errs, fmt.Errorf("%s is missing: apt-get install %s", program, pkg))
		}
	}
	if _, err := os.Stat(binary); err != nil {
		errs = append(errs, fmt.Errorf("%s is missing: make build", binary))
	}
	return errors.Join(errs...)
}

// show prints the steps, in colour where a person is watching.
type show struct {
	out    io.Writer
	colour bool
}

func newShow(out io.Writer) show {
	f, ok := out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return show{out: out}
	}
	st, err := f.Stat()
	return show{out: out, colour: err == nil && st.Mode()&os.ModeCharDevice != 0}
}

const (
	green = "\x1b[1;32m"
	dim   = "\x1b[2m"
	plain = "\x1b[0m"
)

func (s show) paint(colour, text string) string {
	if !s.colour {
		return text
	}
	return colour + text + plain
}

// step prints one proved step, and below it what a program said, if that helps.
func (s show) step(n int, text string, said string) {
	fmt.Fprintf(s.out, "%s %d. %s\n", s.paint(green, "ok"), n, text)
	for line := range strings.Lines(strings.TrimRight(said, "\n")) {
		fmt.Fprintln(s.out, s.paint(dim, "        "+strings.TrimRight(line, "\n")))
	}
}

func (s show) end(took time.Duration) {
	fmt.Fprintf(s.out, "%s all of it in %.0f seconds, and nothing is left behind\n", s.paint(green, "ok"), took.Seconds())
}

func or(v, def string) string {
	if v == "" {
		return def
	}
	return v
}
