package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"ringfence.dev/agent/admin"
)

// endpoint is a listener with what will answer on it.
type endpoint struct {
	listener net.Listener // nil while another program has the port
	handler  func(*Agent) http.Handler
	key      string // in the settings
	address  string
}

// openEndpoints opens the admin socket, and metrics and readiness where they are
// not off. They are open before anything is captured, so that a second agent
// ends early; they answer when everything is there. Anybody may take the port of
// metrics or readiness while the agent is down: that must not keep it down, and
// it is tried again.
func (a *Agent) openEndpoints(closers *stack) ([]endpoint, error) {
	ln, err := admin.Listen(a.settings.AdminSocket)
	if err != nil {
		return nil, err
	}
	closers.push("admin socket", closed(ln))
	ends := []endpoint{{listener: ln, handler: func(a *Agent) http.Handler { return admin.Handler(a) }}}
	for _, e := range []struct {
		key, listen string
		handler     func(*Agent) http.Handler
	}{
		{"metrics", a.settings.MetricsListen, (*Agent).metricsHandler},
		{"readiness", a.settings.ReadinessListen, (*Agent).readinessHandler},
	} {
		if e.listen == "" {
			continue
		}
		end := endpoint{handler: e.handler, key: e.key, address: e.listen}
		ln, err := net.Listen("tcp", e.listen)
		switch {
		case err == nil:
			closers.push(e.key, closed(ln))
			end.listener = ln
		case !errors.Is(err, unix.EADDRINUSE):
			return nil, fmt.Errorf("%s: %w: set %s.listen to an address of this host, or to off", e.key, err, e.key)
		default:
			problem := fmt.Sprintf("%s is not served: another program has %s; free the port, or set %s.listen to another one or to off", e.key, e.listen, e.key)
			a.log.Error(problem)
			a.setProblem(e.key, problem)
		}
		ends = append(ends, end)
	}
	return ends, nil
}

// endpointRetry is how often a taken port is tried again.
const endpointRetry = 2 * time.Second

// serveEndpoint serves until ctx ends, and waits for the port if it is taken.
func (a *Agent) serveEndpoint(ctx context.Context, e endpoint) error {
	if e.listener == nil {
		tick := time.NewTicker(endpointRetry)
		defer tick.Stop()
		for e.listener == nil {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
			if ln, err := net.Listen("tcp", e.address); err == nil {
				e.listener = ln
			}
		}
		a.setProblem(e.key, "")
	}
	return serveHTTP(ctx, e.listener, e.handler(a))
}

// setProblem files what is wrong with one part of the agent, for status; empty means nothing any more.
func (a *Agent) setProblem(part, text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.problems == nil {
		a.problems = map[string]string{}
	}
	a.problems[part] = text
	if text == "" {
		delete(a.problems, part)
	}
}

// currentProblems are those of setProblem, sorted by part.
func (a *Agent) currentProblems() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := []string{}
	for _, part := range slices.Sorted(maps.Keys(a.problems)) {
		list = append(list, a.problems[part])
	}
	return list
}

// closed closes a listener that its server may have closed already.
func closed(ln net.Listener) func() error {
	return func() error {
		if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

// serveHTTP serves until ctx ends; running requests get a second to finish.
func serveHTTP(ctx context.Context, ln net.Listener, h http.Handler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		bound, done := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer done()
		if srv.Shutdown(bound) != nil {
			srv.Close()
		}
	}()
	err := srv.Serve(ln)
	cancel()
	<-stopped
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve %s: %w", ln.Addr(), err)
}

func (a *Agent) readinessHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := a.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
}

// followSignals reloads policies and trust on SIGHUP.
func (a *Agent) followSignals(ctx context.Context, hup <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			if err := a.ReloadPolicy(ctx); err != nil {
				a.log.Error("reload on SIGHUP", "err", err)
			}
		}
	}
}

// notifySystemd tells the service manager where we are; without one it does nothing.
func notifySystemd(state string) {
	_, _ = daemon.SdNotify(false, state) // nobody to tell is no failure
}
