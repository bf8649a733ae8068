package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"ringfence.dev/tools/ringfence/lab"
)

// labName keeps the demo apart from a lab that the user has up.
const labName = "demo"

// stage is the two hosts with what runs on them.
type stage struct {
	lab     *lab.Lab
	binary  string
	mode    string
	files   string // directory of the programs' files
	servers []*exec.Cmd
	here    *lab.Agent // the agent of this very machine, in step 7
}

// raise makes two bare hosts with a web server and a database on the second.
func raise(ctx context.Context, binary, mode string) (s *stage, err error) {
	// What a demo that was killed has left.
	if err := lab.Down(ctx, labName, binary); err != nil {
		return nil, err
	}
	s = &stage{binary: binary, mode: mode}
	if s.lab, err = lab.Up(ctx, lab.Options{Name: labName, Capture: "off", Binary: binary}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.strike())
		}
	}()
	s.files = filepath.Join(s.lab.Dir(), "files")
	if err := os.Mkdir(s.files, 0o700); err != nil {
		return nil, err
	}
	if err := s.serve("b", "web", s.nginx("web", "192.0.2.2:80")); err != nil {
		return nil, err
	}
	redis := exec.Command("redis-server", "--port", "6379", "--bind", "192.0.2.2", "--protected-mode", "no",
		"--save", "", "--appendonly", "no", "--dir", s.files)
	if err := s.serve("b", "database", redis); err != nil {
		return nil, err
	}
	return s, errors.Join(s.lab.WaitListening(ctx, "b", 80), s.lab.WaitListening(ctx, "b", 6379))
}

// webServer answers every request with who it was told is calling.
const webServer = `daemon off;
user root;
worker_processes 1;
error_log stderr crit;
pid %[1]s/%[2]s.pid;
events {}
http {
    log_format targets '$request_uri';
    access_log %[1]s/%[2]s.access targets;
    client_body_temp_path %[1]s/%[2]s-1; proxy_temp_path %[1]s/%[2]s-2;
    fastcgi_temp_path %[1]s/%[2]s-3; uwsgi_temp_path %[1]s/%[2]s-4; scgi_temp_path %[1]s/%[2]s-5;
    server {
        listen %[3]s;
        location / { return 200 "order 7: three lamps; caller: [$http_x_forwarded_client_cert]\n"; }
    }
}
`

// nginx is a web server whose access log is <name>.access.
func (s *stage) nginx(name, listen string) *exec.Cmd {
	conf := filepath.Join(s.files, name+".conf")
	// A failure shows when nginx finds no configuration.
	_ = os.WriteFile(conf, fmt.Appendf(nil, webServer, s.files, name, listen), 0o600)
	return exec.Command("nginx", "-p", s.files, "-c", conf)
}

// serve starts a server as a unit, on a lab host or on this machine.
func (s *stage) serve(host, unit string, cmd *exec.Cmd) error {
	log, err := os.Create(filepath.Join(s.files, unit+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	// Ctrl-C is meant for the demo, which then ends its servers in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.start(host, unit, cmd); err != nil {
		return fmt.Errorf("start %s: %w", unit, err)
	}
	s.servers = append(s.servers, cmd)
	return nil
}

func (s *stage) start(host, unit string, cmd *exec.Cmd) error {
	if host == lab.Here {
		return s.lab.StartHere(unit, cmd)
	}
	return s.lab.Start(host, unit, cmd)
}

// strike ends everything and leaves nothing. It is also for a demo that was interrupted.
func (s *stage) strike() error {
	for _, cmd := range s.servers {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
	}
	s.servers = nil
	var err error
	if s.here != nil {
		err = s.here.Remove(context.Background())
	}
	return errors.Join(err, s.lab.Down(context.Background()))
}

// result is what a program said and how it ended.
type result struct {
	out  string
	code int
}

// run runs a program as a unit and waits for it.
func (s *stage) run(ctx context.Context, host, unit string, argv ...string) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := s.start(host, unit, cmd); err != nil {
		return result{}, fmt.Errorf("run %s on host %s: %w", argv[0], host, err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		return result{}, fmt.Errorf("run %s on host %s: %w", strings.Join(argv, " "), host, errors.Join(ctx.Err(), err))
	}
	return result{out.String(), cmd.ProcessState.ExitCode()}, nil
}

// curl gets a URL. The status code is on a line of its own after the body.
func (s *stage) curl(ctx context.Context, host, unit, url string) (result, error) {
	return s.run(ctx, host, unit, "curl", "-sS", "--max-time", "5", "-w", `\n%{http_code}`, url)
}

// ringfence runs the product's own command against an agent.
func (s *stage) ringfence(ctx context.Context, socket string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, s.binary, args...)
	cmd.Env = append(os.Environ(), "RINGFENCE_SOCKET="+socket)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("ringfence %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// served reports whether a web server has answered a request for a target.
func (s *stage) served(web, target string) (bool, error) {
	data, err := os.ReadFile(filepath.Join(s.files, web+".access"))
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(data)) {
		if strings.TrimSpace(line) == target {
			return true, nil
		}
	}
	return false, nil
}

// writePolicy makes a directory with one policy file, whole.
func (s *stage) writePolicy(name, text string) (dir string, err error) {
	dir = filepath.Join(s.files, "policies-"+name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, name+".cedar"), []byte(text), 0o600)
}

// freePort finds a loopback port that nobody uses now.
func freePort() (uint16, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort().Port(), nil
}
