package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// load is one kind of work, as wrk makes it with one thread.
type load struct {
	name        string
	connections int
	path        string
	header      string
	what        string // for people
}

func (l load) String() string { return l.name }

var allLoads = []load{
	{name: "rest1", connections: 1, path: "/", what: "small responses, one connection"},
	{name: "rest64", connections: 64, path: "/", what: "small responses, 64 connections"},
	{name: "close", connections: 64, path: "/", header: "Connection: close", what: "a new connection per request, 64 at once"},
	{name: "big", connections: 8, path: "/big", what: "responses of 1 MiB, 8 connections"},
}

// reportScript makes wrk print its exact counters, which its own report rounds.
const reportScript = `done = function(s, latency, requests)
  io.write(string.format('\nRESULT {"requests":%d,"bytes":%d,"duration_us":%d,"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d,"p50_us":%d,"p99_us":%d}\n',
    s.requests, s.bytes, s.duration, s.errors.connect, s.errors.read, s.errors.write, s.errors.status, s.errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
`

// outcome is what wrk counted.
type outcome struct {
	Requests   int64 `json:"requests"`
	Bytes      int64 `json:"bytes"`
	DurationUS int64 `json:"duration_us"`
	Connect    int64 `json:"connect"`
	Read       int64 `json:"read"`
	Write      int64 `json:"write"`
	Status     int64 `json:"status"`
	Timeout    int64 `json:"timeout"`
	P50        int64 `json:"p50_us"`
	P99        int64 `json:"p99_us"`
}

// errors counts connection errors, time-outs, and responses that were no success.
func (o outcome) errors() int64 { return o.Connect + o.Read + o.Write + o.Status + o.Timeout }

// drive runs one load for a whole number of seconds.
func (a *arena) drive(ctx context.Context, url string, l load, window time.Duration) (outcome, error) {
	script := filepath.Join(a.dir, "report.lua")
	if err := os.WriteFile(script, []byte(reportScript), 0o600); err != nil {
		return outcome{}, err
	}
	args := []string{"-t1", "-c" + strconv.Itoa(l.connections), "-d" + strconv.Itoa(int(window.Seconds())) + "s",
		"--timeout", "10s", "-s", script}
	if l.header != "" {
		args = append(args, "-H", l.header)
	}
	cmd := exec.CommandContext(ctx, "wrk", append(args, url+l.path)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := a.lab.Start("a", "loader", cmd); err != nil {
		return outcome{}, err
	}
	if err := cmd.Wait(); err != nil {
		return outcome{}, fmt.Errorf("wrk: %w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	return parseOutcome(out.String())
}

func parseOutcome(text string) (o outcome, err error) {
	_, result, ok := strings.Cut(text, "\nRESULT ")
	if !ok {
		return o, fmt.Errorf("wrk printed no result: %s", strings.TrimSpace(text))
	}
	if err := json.Unmarshal([]byte(result), &o); err != nil {
		return o, fmt.Errorf("wrk: %w: %s", err, result)
	}
	if o.Requests <= 0 || o.DurationUS <= 0 {
		return o, fmt.Errorf("no request was completed (%d errors)", o.errors())
	}
	if o.Status > 0 {
		return o, fmt.Errorf("%d of %d responses were no success: this is not the work to be measured", o.Status, o.Requests)
	}
	return o, nil
}
