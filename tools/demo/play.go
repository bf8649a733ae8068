package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"ringfence.dev/tools/ringfence/lab"
)

// Identities in the demo.
const (
	shop     = "spiffe://lab.test/ns/a/sa/shop"
	intruder = "spiffe://lab.test/ns/a/sa/intruder"
	web      = "spiffe://lab.test/ns/b/sa/web"
	database = "spiffe://lab.test/ns/b/sa/database"
)

// policies is the whole policy of the two hosts.
const policies = `@id("shop-reads-web")
@reason("the shop may read from the web service, except what is for administrators")
permit (
    principal == Workload::"` + shop + `",
    action in [Action::"read"],
    resource in Service::"` + web + `"
) unless { context.request.path like "/admin*" };

@id("shop-uses-database")
@reason("the shop keeps its orders in the database")
permit (
    principal == Workload::"` + shop + `",
    action == Action::"connect",
    resource == Service::"` + database + `"
);
`

const webURL = "http://192.0.2.2"

// play runs the steps in order. Each either proves what it says or ends the demo.
func (s *stage) play(ctx context.Context, show show) error {
	steps := []func(context.Context) (line, said string, err error){
		s.inClear, s.protected, s.otherProgram, s.forbiddenPath, s.database, s.dryRun, s.thisMachine, s.asBefore,
	}
	for i, step := range steps {
		line, said, err := step(ctx)
		if err != nil {
			return fmt.Errorf("step %d: %w%s", i+1, err, s.accounts(ctx))
		}
		show.step(i+1, line, said)
	}
	return nil
}

// accounts quotes the agents' last words and decisions, for the error of a step.
func (s *stage) accounts(ctx context.Context) string {
	var b strings.Builder
	quote := func(host string, a *lab.Agent) {
		fmt.Fprintf(&b, "\nagent of host %s:\n%s", host, a.Tail(8))
		if last, err := s.ringfence(ctx, a.Socket, "explain", "--last"); err == nil {
			fmt.Fprintf(&b, "\nits last decision:\n%s", last)
		}
	}
	for _, h := range []string{"a", "b"} {
		if a, ok := s.lab.Agent(h); ok {
			quote(h, a)
		}
	}
	if s.here != nil {
		quote(lab.Here, s.here)
	}
	return b.String()
}

// overTheWire gets a URL on host a as a unit, and returns what an eavesdropper sees meanwhile.
func (s *stage) overTheWire(ctx context.Context, unit, url string) (result, *lab.Wire, error) {
	w, err := s.lab.Record("a")
	if err != nil {
		return result{}, nil, err
	}
	r, err := s.curl(ctx, "a", unit, url)
	return r, w, errors.Join(err, w.Close())
}

func (s *stage) inClear(ctx context.Context) (line, said string, err error) {
	r, w, err := s.overTheWire(ctx, "shop", webURL+"/orders/7")
	switch {
	case err != nil:
		return "", "", err
	case !strings.HasSuffix(r.out, "\n200") || !strings.Contains(r.out, "caller: []"):
		return "", "", fmt.Errorf("a plain request should be answered, by a server that knows nothing of its caller: %q", r.out)
	case !w.Saw("GET /orders/7 HTTP/1.1") || !w.Saw("three lamps"):
		return "", "", errors.New("the wire should carry the request and its answer in clear")
	}
	return "without ringfence, curl's request and nginx's answer cross the wire in clear, and nginx cannot tell who calls",
		"$ curl " + webURL + "/orders/7\n" + firstLine(r.out), nil
}

func (s *stage) protected(ctx context.Context) (line, said string, err error) {
	dir, err := s.writePolicy("hosts", policies)
	if err != nil {
		return "", "", err
	}
	if err := s.lab.Protect(ctx, lab.Options{Capture: s.mode, Policies: dir, Binary: s.binary}); err != nil {
		return "", "", err
	}
	r, w, err := s.overTheWire(ctx, "shop", webURL+"/orders/7")
	switch {
	case err != nil:
		return "", "", err
	case !strings.HasSuffix(r.out, "\n200") || !strings.Contains(r.out, "URI="+shop):
		return "", "", fmt.Errorf("nginx should be told that %s calls: %q", shop, r.out)
	case w.Saw("GET /orders") || w.Saw("three lamps"):
		return "", "", errors.New("the wire should not carry the request or its answer in clear")
	case w.TLSRecords() == 0 || w.Bytes(15008) == 0:
		return "", "", errors.New("the wire should carry TLS to port 15008")
	}
	return "two agents start; the same command, untouched, now crosses as mutual TLS, and nginx sees who calls",
		"$ curl " + webURL + "/orders/7\n" + firstLine(r.out), nil
}

func (s *stage) otherProgram(ctx context.Context) (line, said string, err error) {
	r, err := s.curl(ctx, "a", "intruder", webURL+"/orders/8")
	if err != nil {
		return "", "", err
	}
	if r.code == 0 && !strings.HasSuffix(r.out, "\n403") {
		return "", "", fmt.Errorf("another program on the same host should be refused: %q", r.out)
	}
	if got, err := s.served("web", "/orders/8"); err != nil || got {
		return "", "", errors.Join(errors.New("nginx should never see the refused request"), err)
	}
	said, err = s.ringfence(ctx, s.lab.Socket("a"), "explain", "--last", "--unit", "intruder")
	if err != nil {
		return "", "", err
	}
	if !strings.Contains(said, intruder) || !strings.Contains(said, "DENY") {
		return "", "", fmt.Errorf("the explanation should name the caller and the refusal: %q", said)
	}
	return "another program on the same host is refused, nginx never hears of it, and the decision is explained",
		"$ ringfence explain --last --unit intruder\n" + said, nil
}

func (s *stage) forbiddenPath(ctx context.Context) (line, said string, err error) {
	// Written as an attacker would: policy decides the path that the server will understand.
	r, err := s.run(ctx, "a", "shop", "curl", "-sS", "--path-as-is", "--max-time", "5", "-w", `\n%{http_code}`, webURL+"/orders/../%61dmin/users")
	if err != nil {
		return "", "", err
	}
	if r.code != 0 || !strings.HasSuffix(r.out, "\n403") {
		return "", "", fmt.Errorf("a path that policy excepts should be answered 403: %q", r.out)
	}
	if got, err := s.served("web", "/orders/../%61dmin/users"); err != nil || got {
		return "", "", errors.Join(errors.New("nginx should never see the refused request"), err)
	}
	return "a path that policy does not permit gives the shop a 403, however it is spelt",
		"$ curl --path-as-is " + webURL + "/orders/../%61dmin/users\n" + firstLine(r.out), nil
}

func (s *stage) database(ctx context.Context) (line, said string, err error) {
	w, err := s.lab.Record("a")
	if err != nil {
		return "", "", err
	}
	redis := func(unit string, args ...string) (result, error) {
		return s.run(ctx, "a", unit, append([]string{"redis-cli", "-h", "192.0.2.2"}, args...)...)
	}
	set, err1 := redis("shop", "SET", "order:7", "three lamps and a secret")
	get, err2 := redis("shop", "GET", "order:7")
	other, err3 := redis("intruder", "GET", "order:7")
	if err := errors.Join(err1, err2, err3, w.Close()); err != nil {
		return "", "", err
	}
	switch {
	case set.out != "OK\n" || !strings.Contains(get.out, "three lamps and a secret"):
		return "", "", fmt.Errorf("the database should work for the shop: %q %q", set.out, get.out)
	case strings.Contains(other.out, "three lamps"):
		return "", "", fmt.Errorf("the database should not answer the intruder: %q", other.out)
	case w.Saw("three lamps") || w.Saw("order:7"):
		return "", "", errors.New("the wire should not carry the database's data in clear")
	}
	return "the database works through the same tunnel without a setting, for the shop and for nobody else",
		"$ redis-cli -h 192.0.2.2 GET order:7\n" + get.out, nil
}

func (s *stage) dryRun(ctx context.Context) (line, said string, err error) {
	if err := s.setMode(ctx, "dry-run"); err != nil {
		return "", "", err
	}
	r, err := s.curl(ctx, "a", "intruder", webURL+"/orders/9")
	if err != nil {
		return "", "", err
	}
	if !strings.HasSuffix(r.out, "\n200") || !strings.Contains(r.out, "three lamps") {
		return "", "", fmt.Errorf("dry-run should let the intruder through: %q", r.out)
	}
	said, err = s.ringfence(ctx, s.lab.Socket("a"), "explain", "--last", "--unit", "intruder")
	if err != nil {
		return "", "", err
	}
	if !strings.Contains(said, "WOULD DENY") {
		return "", "", fmt.Errorf("dry-run should say what it would have refused: %q", said)
	}
	return "in dry-run the intruder is let through, and the agent says what it would have refused",
		"$ ringfence explain --last --unit intruder\n" + firstLine(said), s.setMode(ctx, "enforce")
}

func (s *stage) setMode(ctx context.Context, mode string) error {
	for _, h := range []string{"a", "b"} {
		if _, err := s.ringfence(ctx, s.lab.Socket(h), "scope", "mode", h, mode); err != nil {
			return err
		}
	}
	return nil
}

// localPolicy is the policy of this very machine in step 7.
const localPolicy = `@id("report-reads-ledger")
permit (
    principal == Workload::"spiffe://lab.test/ns/here/sa/report",
    action == Action::"connect",
    resource == Service::"spiffe://lab.test/ns/here/sa/ledger"
);
`

func (s *stage) thisMachine(ctx context.Context) (line, said string, err error) {
	port, err := freePort()
	if err != nil {
		return "", "", err
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	if err := s.protectHere(ctx, addr, port); err != nil {
		return "", "", err
	}
	url := "http://" + addr + "/ledger"
	good, err1 := s.curl(ctx, lab.Here, "report", url)
	bad, err2 := s.curl(ctx, lab.Here, "stranger", url+"?stranger")
	if err := errors.Join(err1, err2); err != nil {
		return "", "", err
	}
	if !strings.HasSuffix(good.out, "\n200") || !strings.Contains(good.out, "URI=spiffe://lab.test/ns/here/sa/report") {
		return "", "", fmt.Errorf("the permitted service should be answered, and known: %q", good.out)
	}
	if got, err := s.served("ledger", "/ledger?stranger"); err != nil || got || bad.code == 0 {
		return "", "", errors.Join(fmt.Errorf("the other service should be refused before nginx hears of it: %q", bad.out), err)
	}
	agent := s.here
	s.here = nil
	return "on this very machine, over 127.0.0.1, one service may call another and a third may not",
		fmt.Sprintf("report:   $ curl %s\n          %s\nstranger: $ curl %s\n          %s", url, firstLine(good.out), url, firstLine(bad.out)),
		agent.Remove(ctx)
}

// protectHere starts a web server on this machine and an agent for the demo's own
// cgroups: nothing else on the machine is looked at.
func (s *stage) protectHere(ctx context.Context, addr string, port uint16) error {
	if err := s.serve(lab.Here, "ledger", s.nginx("ledger", addr)); err != nil {
		return err
	}
	if err := s.lab.WaitListening(ctx, lab.Here, port); err != nil {
		return err
	}
	dir, err := s.writePolicy("here", localPolicy)
	if err != nil {
		return err
	}
	base := filepath.Join(s.lab.Dir(), lab.Here)
	s.here, err = lab.NewAgent(s.binary, base, lab.AgentConfig{
		Instance: labName + "-" + lab.Here, TrustDomain: "lab.test", Host: lab.Here,
		StateDir: filepath.Join(base, "state"), Capture: s.mode, Policies: dir,
		UnitRoots: []string{s.lab.UnitRoot(lab.Here)},
		Scopes: []lab.Scope{{
			Name: "host", Host: true, Cgroups: []string{s.lab.UnitRoot(lab.Here) + "/*"},
			Mode: "enforce", Loopback: "enforce",
		}},
		Admin:        lab.AdminSocket{Socket: s.lab.Socket(lab.Here)},
		Metrics:      lab.Endpoint{Listen: "off"},
		Readiness:    lab.Endpoint{Listen: "off"},
		DecisionLog:  lab.LogFile{Path: filepath.Join(base, "decisions.jsonl")},
		DrainTimeout: "1s",
	})
	if err != nil {
		return err
	}
	return s.here.Start(ctx)
}

func (s *stage) asBefore(ctx context.Context) (line, said string, err error) {
	if err := s.lab.Unprotect(ctx); err != nil {
		return "", "", err
	}
	r, w, err := s.overTheWire(ctx, "intruder", webURL+"/orders/7")
	switch {
	case err != nil:
		return "", "", err
	case !strings.HasSuffix(r.out, "\n200") || !strings.Contains(r.out, "caller: []"):
		return "", "", fmt.Errorf("without agents, everybody should be answered as before: %q", r.out)
	case !w.Saw("GET /orders/7 HTTP/1.1") || w.Bytes(15008) != 0:
		return "", "", errors.New("without agents, the wire should carry the request as before")
	}
	return "the agents stop, and everything is as before",
		"$ curl " + webURL + "/orders/7\n" + firstLine(r.out), nil
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}
