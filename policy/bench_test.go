package policy_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
	"ringfence.dev/policy/decisionlog"
)

// manyPolicies is n policies of which three concern curl and nginx.
func manyPolicies(n int) string {
	var b strings.Builder
	for i := range n {
		switch i % 3 {
		case 0:
			fmt.Fprintf(&b, `permit(principal == Workload::"spiffe://lab.test/ns/a/sa/w%d", action in [Action::"read"], resource in Service::"spiffe://lab.test/ns/b/sa/s%d") when { context.request.path like "/api/*" && context.mesh };`, i, i)
		case 1:
			fmt.Fprintf(&b, `permit(principal == Workload::"spiffe://lab.test/ns/a/sa/w%d", action == Action::"connect", resource);`, i)
		case 2:
			fmt.Fprintf(&b, `forbid(principal, action in Action::"write", resource in Service::"spiffe://lab.test/ns/b/sa/s%d") when { context.request.segments.s0 == "admin" };`, i)
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, `permit(principal == Workload::"%s", action in [Action::"read"], resource in Service::"%s") when { context.request.path like "/api/*" && context.mesh };`, curl, nginx)
	fmt.Fprintf(&b, `permit(principal in TrustDomain::"lab.test", action == Action::"GET", resource == Service::"%s") when { context.request.segments.s0 == "public" };`, nginx)
	fmt.Fprintf(&b, `forbid(principal, action in Action::"http", resource in Service::"%s") when { context.request.path like "*/admin*" };`, nginx)
	return b.String()
}

func benchEngine(b *testing.B, n int) *policy.Engine {
	log, err := decisionlog.New(decisionlog.Config{Path: filepath.Join(b.TempDir(), "decisions.jsonl")})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- log.Run(ctx) }()
	b.Cleanup(func() { cancel(); <-done })
	return engineOf(b, policy.Config{Dir: write(b, "p.cedar", manyPolicies(n)), Log: log})
}

// BenchmarkRequestCached is the steady state: a request that was decided
// before, recorded to a file. The goal is below 2 us and no allocation.
func BenchmarkRequestCached(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := open(b, benchEngine(b, n), meshed(curl, nginx))
			r := authz.Request{Method: "GET", Target: "/api/orders/7?x=y", Host: "nginx.lab.test"}
			want(b, must(s.Request(&r)), authz.Permit)
			b.ReportAllocs()
			for b.Loop() {
				must(s.Request(&r))
			}
		})
	}
}

// BenchmarkRequestCold asks what was never asked. The goal is below 20 us at 1,000 policies.
func BenchmarkRequestCold(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := open(b, benchEngine(b, n), meshed(curl, nginx))
			targets := make([]string, 1<<14)
			for i := range targets {
				targets[i] = fmt.Sprintf("/api/orders/%d/items?x=y", i)
			}
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				r := authz.Request{Method: "GET", Target: targets[i%len(targets)], Host: "nginx.lab.test"}
				must(s.Request(&r))
				i++
			}
		})
	}
}

// BenchmarkConnect is a new connection between a known pair.
func BenchmarkConnect(b *testing.B) {
	e := benchEngine(b, 1000)
	c := meshed(curl, nginx)
	b.ReportAllocs()
	for b.Loop() {
		s, err := e.Open(c)
		if err != nil {
			b.Fatal(err)
		}
		must(s.Connect())
	}
}

// BenchmarkConnectNewPair is a connection between two that were never seen.
func BenchmarkConnectNewPair(b *testing.B) {
	e := benchEngine(b, 1000)
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		c := meshed(curl, nginx)
		i++
		c.Source.Addr = addrPort(fmt.Sprintf("10.%d.%d.%d", i>>16&255, i>>8&255, i&255), 1)
		s, err := e.Open(c)
		if err != nil {
			b.Fatal(err)
		}
		must(s.Connect())
	}
}

func BenchmarkLoad(b *testing.B) {
	dir := write(b, "p.cedar", manyPolicies(1000))
	for b.Loop() {
		if p := policy.Check(dir); p != nil {
			b.Fatal(p)
		}
	}
}

func must(d authz.Decision, err error) authz.Decision {
	if err != nil {
		panic(err)
	}
	return d
}
