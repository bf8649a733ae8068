// Command bench compares ringfence with the proxies a user would pick instead,
// in one run on one machine: the same origin, the same load, the same encryption
// (mutual TLS 1.3 with P-256 certificates) and one added header, each proxy with
// one thread, in two network namespaces.
//
// What it compares is CPU time per request, which a busy machine disturbs least;
// rates and latencies are shown beside it. Rounds are interleaved over the peers
// so that a drift of the machine meets all of them, and medians are printed.
// Absolute figures say little about another machine: read the ratios.
//
// It is not a test and has no limits of its own: it prints a table, and writes
// all raw counters to build/bench.json.
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
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// settings are the checked flags.
type settings struct {
	window time.Duration
	rounds int
	peers  []peer
	loads  []load
	binary string
	output string
}

func run(ctx context.Context, args []string, out io.Writer) error {
	s, err := parse(args, out)
	if err != nil {
		return err
	}
	if err := requirements(s); err != nil {
		return err
	}
	results, err := measure(ctx, s, out)
	if err != nil {
		return err
	}
	if err := writeJSON(s.output, results); err != nil {
		return err
	}
	fmt.Fprintln(out)
	writeTables(out, s, results)
	fmt.Fprintf(out, "\nraw counters: %s\n", s.output)
	return nil
}

func parse(args []string, out io.Writer) (settings, error) {
	var s settings
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(out)
	quick := f.Bool("quick", false, "windows of 2 seconds and one round: a hint, not a result")
	seconds := f.Int("seconds", 5, "length of a measured window")
	rounds := f.Int("rounds", 3, "rounds, of which the median counts")
	peers := f.String("peers", strings.Join(names(allPeers), ","), "what to compare")
	loads := f.String("loads", strings.Join(names(allLoads), ","), "under which loads")
	f.StringVar(&s.binary, "binary", "bin/ringfence", "the ringfence command to measure")
	f.StringVar(&s.output, "o", "build/bench.json", "where to write the raw counters")
	if err := f.Parse(args); err != nil {
		return s, err
	}
	if *quick {
		*seconds, *rounds = 2, 1
	}
	if f.NArg() > 0 || *seconds < 1 || *rounds < 1 {
		return s, errors.New("windows and rounds must be at least one, and there are no arguments besides flags")
	}
	s.window, s.rounds = time.Duration(*seconds)*time.Second, *rounds
	var err1, err2, err3 error
	s.peers, err1 = pick(*peers, allPeers)
	s.loads, err2 = pick(*loads, allLoads)
	s.binary, err3 = filepath.Abs(s.binary)
	return s, errors.Join(err1, err2, err3)
}

// named is what can be picked by name on the command line.
type named interface{ String() string }

func names[T named](all []T) (list []string) {
	for _, v := range all {
		list = append(list, v.String())
	}
	return list
}

func pick[T named](list string, all []T) (picked []T, err error) {
next:
	for name := range strings.SplitSeq(list, ",") {
		for _, v := range all {
			if v.String() == name {
				picked = append(picked, v)
				continue next
			}
		}
		return nil, fmt.Errorf("%q is none of %s", name, strings.Join(names(all), ", "))
	}
	return picked, nil
}

// packages names the Debian package of each program that is run.
var packages = map[string]string{"wrk": "wrk", "curl": "curl", "nginx": "nginx-light", "haproxy": "haproxy"}

// requirements reports everything that is missing at once.
func requirements(s settings) error {
	// Debian's users have no sbin in their PATH, and sudo may keep theirs.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	need := map[string]bool{"wrk": true, "curl": true, "nginx": true}
	for _, p := range s.peers {
		need[p.program] = true
	}
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("needs root: it makes network namespaces"))
	}
	for program, pkg := range packages {
		if _, err := exec.LookPath(program); need[program] && err != nil {
			errs = append(errs, fmt.Errorf("%s is missing: apt-get install %s", program, pkg))
		}
	}
	if _, err := os.Stat(s.binary); need["ringfence"] && err != nil {
		errs = append(errs, fmt.Errorf("%s is missing: make build", s.binary))
	}
	return errors.Join(errs...)
}
