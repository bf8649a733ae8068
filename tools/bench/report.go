package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// writeJSON writes the results as a list, sorted by load and peer.
func writeJSON(path string, results map[string]*result) error {
	list := []*result{}
	for _, r := range results {
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b *result) int {
		return strings.Compare(a.Load+"/"+a.Peer, b.Load+"/"+b.Peer)
	})
	data, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

// writeTables prints a table per load, with ratios to the HAProxy pair.
func writeTables(out io.Writer, s settings, results map[string]*result) {
	for _, l := range s.loads {
		fmt.Fprintf(out, "%s: %s\n", l.name, l.what)
		writeTable(out, s, l, results)
		fmt.Fprintln(out)
	}
	fmt.Fprintf(out, "median of %d rounds of %s; CPU is user and system time of all threads of both proxies; ratios are to the HAProxy pair;\n", s.rounds, s.window)
	fmt.Fprintln(out, "machine is the busy time of all processors, with client, origin and interrupts, by request; errors are of all rounds")
}

func writeTable(out io.Writer, s settings, l load, results map[string]*result) {
	base := results["haproxy/"+l.name]
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	bulk := ""
	if l.path == "/big" {
		bulk = "MB/s\t"
	}
	fmt.Fprintf(t, "peer\tCPU us/request\tratio\trequests/s\tratio\tp50 us\tp99 us\t%smachine us/request\tRSS MB\terrors\t\n", bulk)
	for _, p := range s.peers {
		r := results[key(p, l)]
		if r == nil {
			continue
		}
		if bulk != "" {
			bulk = fmt.Sprintf("%.0f\t", r.MBps)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%.0f\t%s\t%d\t%d\t%s%.1f\t%s\t%d\t\n", r.Peer,
			zeroAsDash(r.CPU, "%.1f"), ratio(r, base, func(r *result) float64 { return r.CPU }),
			r.Rate, ratio(r, base, func(r *result) float64 { return r.Rate }),
			r.P50, r.P99, bulk, r.System, zeroAsDash(float64(r.RSS)/1e6, "%.1f"), r.Errors)
	}
	_ = t.Flush()
}

// zeroAsDash prints no figure where there is no proxy to have one.
func zeroAsDash(v float64, format string) string {
	if v == 0 {
		return "-"
	}
	return fmt.Sprintf(format, v)
}

func ratio(r, base *result, f func(*result) float64) string {
	if base == nil || f(base) == 0 || f(r) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", f(r)/f(base))
}
