package iptables

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"time"

	"ringfence.dev/attest/cgroup"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/cni/netns"
)

// fireLimit bounds the writing of all wills: a few commands for each namespace.
const fireLimit = time.Minute

// OpenGuardFD returns the guard process's end of the connection.
func OpenGuardFD() (net.Conn, error) {
	file := os.NewFile(GuardFD, "guard")
	if file == nil {
		return nil, fmt.Errorf("guard: descriptor %d is not open", GuardFD)
	}
	defer file.Close()
	return net.FileConn(file)
}

// RunGuard is the whole work of a guard process. It holds the last will of every
// scope that the agent tells it, and writes them when the connection ends or
// is silent for longer than [GuardLimit]: an enforcing scope then refuses, any
// other passes untouched. After a mere silence it goes on, and the agent writes its
// rules again; after the end it returns nil. When ctx ends it returns without
// having done anything. It closes conn.
func RunGuard(ctx context.Context, conn net.Conn, log *slog.Logger) error {
	return runGuard(ctx, conn, log, GuardLimit)
}

func runGuard(ctx context.Context, conn net.Conn, log *slog.Logger, limit time.Duration) error {
	tools, err := fw.Find(ctx)
	if err != nil {
		conn.Close()
		return err
	}
	tree, err := cgroup.Open(cgroup.Config{})
	if err != nil {
		conn.Close()
		return err
	}
	g := &guard{conn: conn, limit: limit, log: log, tools: tools, tree: tree, wills: map[string]*armed{}}
	defer g.close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return g.serve(ctx)
}

// guard is owned by one goroutine.
type guard struct {
	conn  net.Conn
	limit time.Duration
	log   *slog.Logger
	tools *fw.Tools
	tree  *cgroup.Tree
	wills map[string]*armed
	fired bool // since the last reply
}

// armed is a will with its namespace, held open because the agent will not be
// there to ask.
type armed struct {
	will
	ns *netns.Handle
}

func (g *guard) serve(ctx context.Context) error {
	in := &lines{conn: g.conn}
	for {
		deadline := time.Time{}
		if !g.fired {
			deadline = time.Now().Add(g.limit)
		}
		if err := g.conn.SetReadDeadline(deadline); err != nil && ctx.Err() == nil {
			return err
		}
		line, err := in.next()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, os.ErrDeadlineExceeded):
			g.log.Warn("the agent is silent", "for", g.limit)
			g.fire()
		case err != nil:
			// io.EOF, or a reset when the agent died with replies unread.
			if !errors.Is(err, io.EOF) {
				g.log.Warn("connection to the agent failed", "error", err)
			}
			g.fire()
			return nil
		default:
			if err := g.answer(line); err != nil {
				g.log.Warn("the agent cannot be answered", "error", err)
			}
		}
	}
}

func (g *guard) answer(line []byte) error {
	var r request
	var out reply
	err := json.Unmarshal(line, &r)
	if err == nil {
		err = g.do(r)
	}
	if err != nil {
		out.Error = err.Error()
	}
	out.Fired, g.fired = g.fired, false
	if err := g.conn.SetWriteDeadline(time.Now().Add(g.limit)); err != nil {
		return err
	}
	return send(g.conn, out)
}

func (g *guard) do(r request) error {
	switch {
	case r.Op == "beat":
		return nil
	case r.Op == "forget" && r.Will != nil:
		g.forget(r.Will.Scope)
		return nil
	case r.Op == "arm" && r.Will != nil:
		ns, err := netns.Open(r.Will.NetNS)
		if err != nil {
			return err
		}
		g.forget(r.Will.Scope)
		g.wills[r.Will.Scope] = &armed{will: *r.Will, ns: ns}
		return nil
	}
	return errMessage
}

func (g *guard) forget(scope string) {
	if a := g.wills[scope]; a != nil {
		a.ns.Close()
		delete(g.wills, scope)
	}
}

// fire writes every will. One that fails is tried again after the others: the
// usual cause is that somebody else holds the lock.
func (g *guard) fire() {
	g.fired = true
	ctx, cancel := context.WithTimeout(context.Background(), fireLimit)
	defer cancel()
	left := make([]*armed, 0, len(g.wills))
	for _, a := range g.wills {
		left = append(left, a)
	}
	for range 3 {
		var failed []*armed
		for _, a := range left {
			g.prune(a.Down)
			if err := g.tools.OpenAs(a.ns, a.Variant).Apply(ctx, a.Down); err != nil {
				g.log.Error("rules for a scope without agent could not be written", "scope", a.Scope, "error", err)
				failed = append(failed, a)
			}
		}
		left = failed
	}
}

// prune drops rules about cgroups that are gone, such as the agent's own, which
// its service manager removes with it. One such rule would fail all.
func (g *guard) prune(down map[fw.Family]fw.Ruleset) {
	for _, rules := range down {
		for i := range rules {
			rules[i].Rules = slices.DeleteFunc(rules[i].Rules, func(r fw.Rule) bool {
				at := slices.Index(r, "--path")
				if at < 0 || at+1 >= len(r) {
					return false
				}
				_, err := g.tree.ID(r[at+1])
				return err != nil
			})
		}
	}
}

func (g *guard) close() {
	g.conn.Close()
	for scope := range g.wills {
		g.forget(scope)
	}
}
