package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"ringfence.dev/tools/ringfence/lab"
)

// round is one measured window with its raw counters.
type round struct {
	CPUNanos  int64   `json:"cpu_ns"`        // of both proxies, all threads, user and system
	BusyNanos int64   `json:"system_cpu_ns"` // of the whole machine
	Requests  int64   `json:"requests"`
	Seconds   float64 `json:"seconds"`
	Bytes     int64   `json:"bytes"` // read by the client
	Errors    int64   `json:"errors"`
	P50       int64   `json:"p50_us"`
	P99       int64   `json:"p99_us"`
	RSS       int64   `json:"rss_bytes"`
}

func (r round) cpuPerRequest() float64 { return float64(r.CPUNanos) / 1000 / float64(r.Requests) }

// result is one peer under one load: medians of its rounds, and the counters of
// the round with the median CPU time per request.
type result struct {
	Peer string `json:"peer"`
	Load string `json:"load"`

	CPU    float64 `json:"cpu_us_per_request"`
	System float64 `json:"system_us_per_request"`
	Rate   float64 `json:"requests_per_s"`
	MBps   float64 `json:"mb_per_s"`
	round          // CPUNanos, Requests, Seconds, Bytes of the median round; Errors of all rounds
	Rounds []round `json:"rounds"`
}

// measure runs all rounds. The order of the peers turns with each round.
func measure(ctx context.Context, s settings, out io.Writer) (map[string]*result, error) {
	warnBusy(out)
	// What a run that was killed has left.
	if err := lab.Down(ctx, labName, ""); err != nil {
		return nil, err
	}
	results := map[string]*result{}
	for n := range s.rounds {
		for i := range s.peers {
			p := s.peers[(i+n)%len(s.peers)]
			if err := measurePeer(ctx, s, p, n, results, out); err != nil {
				return nil, err
			}
		}
	}
	for _, r := range results {
		r.summarise()
	}
	return results, nil
}

func key(p peer, l load) string { return p.name + "/" + l.name }

func measurePeer(ctx context.Context, s settings, p peer, n int, results map[string]*result, out io.Writer) (err error) {
	if !slices.ContainsFunc(s.loads, p.runs) {
		return nil
	}
	a, err := enter(ctx, s, p)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.leave()) }()
	// Not counted: buffers, pools and caches fill.
	if _, err := a.drive(ctx, p.target, allLoads[1], time.Second); err != nil {
		return fmt.Errorf("%s, warm-up: %w%s", p, err, a.said())
	}
	for _, l := range s.loads {
		if !p.runs(l) {
			continue
		}
		r, err := a.window(ctx, p, l, s.window)
		if err != nil {
			return fmt.Errorf("%s under %s: %w%s", p, l, err, a.said())
		}
		fmt.Fprintf(out, "round %d of %d  %-18s %-7s %8.1f us CPU per request, %.0f requests/s\n",
			n+1, s.rounds, p, l, r.cpuPerRequest(), float64(r.Requests)/r.Seconds)
		k := key(p, l)
		if results[k] == nil {
			results[k] = &result{Peer: p.name, Load: l.name}
		}
		results[k].Rounds = append(results[k].Rounds, r)
	}
	return nil
}

// window measures one load once.
func (a *arena) window(ctx context.Context, p peer, l load, length time.Duration) (round, error) {
	before, err := look(a.proxies)
	if err != nil {
		return round{}, err
	}
	o, err := a.drive(ctx, p.target, l, length)
	if err != nil {
		return round{}, err
	}
	after, err := look(a.proxies)
	if err != nil {
		return round{}, err
	}
	cpu, busy, err := after.since(before)
	if err != nil {
		return round{}, err
	}
	rss, err := residentSet(a.proxies)
	if err != nil {
		return round{}, err
	}
	if p.program == "ringfence" {
		if n, err := a.lab.Sockets("a", 15008, lab.Established); err != nil || n == 0 {
			return round{}, errors.Join(errors.New("no tunnel is open after the load"), err)
		}
	}
	return round{
		CPUNanos: int64(cpu), BusyNanos: int64(busy), Requests: o.Requests,
		Seconds: float64(o.DurationUS) / 1e6, Bytes: o.Bytes, Errors: o.errors(),
		P50: o.P50, P99: o.P99, RSS: rss,
	}, nil
}

// summarise fills in the medians.
func (r *result) summarise() {
	byCPU := slices.Clone(r.Rounds)
	slices.SortStableFunc(byCPU, func(a, b round) int {
		switch x, y := a.cpuPerRequest(), b.cpuPerRequest(); {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
	r.round = byCPU[len(byCPU)/2]
	r.CPU = median(r.Rounds, round.cpuPerRequest)
	r.System = median(r.Rounds, func(r round) float64 { return float64(r.BusyNanos) / 1000 / float64(r.Requests) })
	r.Rate = median(r.Rounds, func(r round) float64 { return float64(r.Requests) / r.Seconds })
	r.MBps = median(r.Rounds, func(r round) float64 { return float64(r.Bytes) / 1e6 / r.Seconds })
	r.P50 = int64(median(r.Rounds, func(r round) float64 { return float64(r.P50) }))
	r.P99 = int64(median(r.Rounds, func(r round) float64 { return float64(r.P99) }))
	r.RSS = int64(median(r.Rounds, func(r round) float64 { return float64(r.RSS) }))
	r.Errors = 0
	for _, round := range r.Rounds {
		r.Errors += round.Errors
	}
}

// median of an even number is the mean of the two in the middle.
func median(rounds []round, f func(round) float64) float64 {
	v := make([]float64, len(rounds))
	for i, r := range rounds {
		v[i] = f(r)
	}
	slices.Sort(v)
	m := len(v) / 2
	if len(v)%2 == 1 {
		return v[m]
	}
	return (v[m-1] + v[m]) / 2
}

// warnBusy says when others are at work on the machine, since that shows in
// rates and latencies, and through caches in CPU time too.
func warnBusy(out io.Writer) {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return
	}
	var one float64
	if _, err := fmt.Sscan(string(data), &one); err == nil && one > 0.5 {
		fmt.Fprintf(out, "note: the machine is not idle (load %s); trust the ratios more than the figures\n",
			strings.Fields(string(data))[0])
	}
}
