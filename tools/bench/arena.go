package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"ringfence.dev/tools/ringfence/lab"
)

// labName keeps the benchmark apart from a lab that the user has up.
const labName = "bench"

// arena is what one peer is measured in: two hosts, an origin, a pair of proxies.
type arena struct {
	lab *lab.Lab
	dir string
	// proxies are the processes whose CPU time counts, their children included.
	proxies []int
	started []*exec.Cmd
}

// enter makes an arena for a peer, with everything running and proved to work.
func enter(ctx context.Context, s settings, p peer) (a *arena, err error) {
	a = &arena{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w%s", p, err, a.said()), a.leave())
		}
	}()
	if a.lab, err = lab.Up(ctx, lab.Options{Name: labName, Capture: p.capture, Binary: s.binary}); err != nil {
		return a, err
	}
	a.dir = a.lab.Dir() + "/files"
	if err := os.Mkdir(a.dir, 0o700); err != nil {
		return a, err
	}
	origin, err := originCommand(a.dir)
	if err != nil {
		return a, err
	}
	if err := a.start("b", "origin", origin); err != nil {
		return a, err
	}
	if err := a.lab.WaitListening(ctx, "b", 80); err != nil {
		return a, err
	}
	for _, host := range []string{"a", "b"} {
		if agent, ok := a.lab.Agent(host); ok {
			a.proxies = append(a.proxies, agent.PID())
		}
	}
	if err := a.startPair(ctx, p); err != nil {
		return a, err
	}
	return a, a.verify(ctx, p)
}

// start starts a program on a host, as a unit.
func (a *arena) start(host, unit string, cmd *exec.Cmd) error {
	log, err := os.Create(filepath.Join(a.dir, unit+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	// Ctrl-C is meant for this program, which then ends the others in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := a.lab.Start(host, unit, cmd); err != nil {
		return fmt.Errorf("start %s: %w", unit, err)
	}
	a.started = append(a.started, cmd)
	return nil
}

// said returns what the programs wrote, for an error's sake.
func (a *arena) said() string {
	var text strings.Builder
	logs, _ := filepath.Glob(filepath.Join(a.dir, "*.log"))
	for _, path := range logs {
		if data, err := os.ReadFile(path); err == nil && len(data) > 0 && a.dir != "" {
			fmt.Fprintf(&text, "\n%s: %s", filepath.Base(path), bytes.TrimSpace(data))
		}
	}
	return text.String()
}

// leave ends everything and leaves nothing.
func (a *arena) leave() error {
	var errs []error
	for i := len(a.started) - 1; i >= 0; i-- {
		cmd := a.started[i]
		_ = cmd.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
	}
	errs = append(errs, lab.Down(context.Background(), labName, ""))
	return errors.Join(errs...)
}

// verify proves that the peer does what it is measured for: one request whose
// path must not be readable on the wire, and to which the far side added a
// header. A figure for a pair that does less would be worthless.
func (a *arena) verify(ctx context.Context, p peer) error {
	wire, err := a.lab.Record("a")
	if err != nil {
		return err
	}
	seen, err := a.curl(ctx, p.target+"/seen?marker=in-the-clear")
	if err := errors.Join(err, wire.Close()); err != nil {
		return fmt.Errorf("one request: %w", err)
	}
	clear := wire.Saw("marker=in-the-clear")
	switch {
	case !p.secure() && (!clear || seen != ""):
		return errors.New("a direct request was not seen on the wire as it was sent")
	case !p.secure():
		return nil
	case clear:
		return errors.New("the request passed the wire in clear")
	case wire.TLSRecords() == 0:
		return errors.New("no TLS was seen on the wire")
	case seen == "":
		return errors.New("the origin saw no X-Forwarded-Client-Cert: nothing was added to the request")
	case p.program == "ringfence" && wire.Bytes(15008) == 0:
		return errors.New("nothing passed through port 15008")
	}
	return nil
}

func (a *arena) curl(ctx context.Context, url string) (string, error) {
	cmd := exec.CommandContext(ctx, "curl", "-sS", "--fail", "--max-time", "10", url)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := a.lab.Start("a", "loader", cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("curl %s: %w: %s", url, err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}
