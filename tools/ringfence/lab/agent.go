package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

const (
	// readyWithin bounds the wait for an agent: loading programs into the kernel
	// takes a second on a slow machine, and a first start makes keys.
	readyWithin = 30 * time.Second
	// stopWithin is how long an agent may take to end, its drain included.
	stopWithin = 8 * time.Second
	drain      = "2s"
	// lastLines is how much of an agent's log an error quotes.
	lastLines = 40
)

// AgentConfig is the part of an agent's settings that a lab sets.
type AgentConfig struct {
	Instance     string      `yaml:"instance"`
	TrustDomain  string      `yaml:"trust_domain"`
	Host         string      `yaml:"host"`
	StateDir     string      `yaml:"state_dir"`
	Capture      string      `yaml:"capture"`
	Policies     string      `yaml:"policies"`
	UnitRoots    []string    `yaml:"unit_roots"`
	Scopes       []Scope     `yaml:"scopes"`
	Admin        AdminSocket `yaml:"admin"`
	Metrics      Endpoint    `yaml:"metrics"`
	Readiness    Endpoint    `yaml:"readiness"`
	DecisionLog  LogFile     `yaml:"decision_log"`
	DrainTimeout string      `yaml:"drain_timeout"`
}

// Scope is one scope of an agent: a network namespace, or some cgroups of the machine itself.
type Scope struct {
	Name     string   `yaml:"name"`
	Host     bool     `yaml:"host,omitempty"`
	NetNS    string   `yaml:"netns,omitempty"`
	Cgroups  []string `yaml:"cgroups,omitempty"`
	Mode     string   `yaml:"mode"`
	Loopback string   `yaml:"loopback"`
}

type (
	// AdminSocket is where the agent's admin socket is.
	AdminSocket struct {
		Socket string `yaml:"socket"`
	}
	// Endpoint is where the agent serves HTTP: host:port, or off.
	Endpoint struct {
		Listen string `yaml:"listen"`
	}
	// LogFile is where the agent writes decisions.
	LogFile struct {
		Path string `yaml:"path"`
	}
)

// Agent is one agent process, run by the lab or on its own.
type Agent struct {
	// Binary is the ringfence command, Dir the directory of its settings
	// (agent.yaml), log (agent.log) and pid file (agent.pid).
	Binary, Dir string
	// Socket is the path of its admin socket.
	Socket string

	// child is set while the agent is this process's own, and must be waited for.
	child *exec.Cmd
}

// NewAgent writes an agent's settings below dir, which it makes with mode 0700.
// Nothing is started.
func NewAgent(binary, dir string, c AgentConfig) (*Agent, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	data, err := yaml.Marshal(c)
	if err != nil {
		return nil, err
	}
	if err := writeFile(filepath.Join(dir, "agent.yaml"), data); err != nil {
		return nil, fmt.Errorf("agent settings: %w", err)
	}
	return &Agent{Binary: binary, Dir: dir, Socket: c.Admin.Socket}, nil
}

func (a *Agent) file(name string) string { return filepath.Join(a.Dir, "agent."+name) }

// PID is the agent's process id, zero when it does not run.
func (a *Agent) PID() int {
	p, err := readPIDFile(a.file("pid"))
	if err != nil || !p.alive() {
		return 0
	}
	return p.PID
}

// Start runs the agent and returns once it is ready. When it ends or is not
// ready in time, the error carries the last lines of its log, and nothing is
// left running.
func (a *Agent) Start(ctx context.Context) error {
	if pid := a.PID(); pid != 0 {
		return fmt.Errorf("agent runs already as process %d", pid)
	}
	log, err := os.OpenFile(a.file("log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(a.Binary, "agent", "--config", a.file("yaml"))
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, "/"
	// A session of its own: it outlives the terminal, and Ctrl-C there is not meant for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	a.child = cmd
	if err := a.becomeReady(ctx); err != nil {
		err = fmt.Errorf("%w\n%s", err, a.Tail(lastLines))
		return errors.Join(err, a.Stop(context.WithoutCancel(ctx)))
	}
	return nil
}

func (a *Agent) becomeReady(ctx context.Context) error {
	p, err := inspect(a.child.Process.Pid)
	if err != nil {
		return errors.New("agent ended at once")
	}
	if err := p.writePIDFile(a.file("pid")); err != nil {
		return err
	}
	fd, err := p.open()
	if err != nil {
		return errors.New("agent ended at once")
	}
	defer unix.Close(fd)
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	for {
		notReady := a.Ready(ctx)
		if notReady == nil {
			return nil
		}
		if ended(ctx, fd, 25*time.Millisecond) {
			return errors.New("agent ended before it was ready")
		}
		if ctx.Err() != nil {
			return fmt.Errorf("agent is not ready: %w (%w)", notReady, context.Cause(ctx))
		}
	}
}

// Ready asks the agent whether it is ready; nil means yes.
func (a *Agent) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := a.Get(ctx, "/readyz")
	return err
}

// maxAnswer bounds what Get reads from the admin socket.
const maxAnswer = 16 << 20

// Get asks the agent's admin socket for a path and returns the body of a 200 answer.
func (a *Agent) Get(ctx context.Context, path string) ([]byte, error) {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", a.Socket)
		},
	}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://ringfence"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", path, resp.Status, strings.TrimSpace(string(body)))
	}
	return body, nil
}

// Stop ends the agent, by force when it does not end in time. What it pinned in
// the kernel stays; Cleanup removes that. Stopping a stopped agent is no error.
func (a *Agent) Stop(ctx context.Context) error {
	p, err := readPIDFile(a.file("pid"))
	switch {
	case errors.Is(err, errGone):
	case err != nil:
		return err
	default:
		if err := p.stop(ctx, stopWithin); err != nil {
			return fmt.Errorf("stop agent: %w", err)
		}
	}
	if a.child != nil {
		if err != nil { // it never got a pid file
			_ = a.child.Process.Kill()
		}
		_ = a.child.Wait() // its exit status is in its log, if it matters
		a.child = nil
	}
	if err := os.Remove(a.file("pid")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Cleanup removes what a stopped agent left in the kernel: pins, rules, its cgroup.
func (a *Agent) Cleanup(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	out, err := exec.CommandContext(ctx, a.Binary, "agent", "--cleanup", "--config", a.file("yaml")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("agent --cleanup: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Remove stops the agent and removes what it left in the kernel and its
// directory. An agent that was never set up, or is removed already, is no error.
func (a *Agent) Remove(ctx context.Context) error {
	if _, err := os.Stat(a.file("yaml")); errors.Is(err, os.ErrNotExist) {
		return os.RemoveAll(a.Dir)
	}
	if err := errors.Join(a.Stop(ctx), a.Cleanup(ctx)); err != nil {
		return err // its directory stays, for another try
	}
	return os.RemoveAll(a.Dir)
}

// Tail returns the last n lines of the agent's log.
func (a *Agent) Tail(n int) string {
	data, err := os.ReadFile(a.file("log"))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
