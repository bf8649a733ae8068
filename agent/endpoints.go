package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"ringfence.dev/agent/admin"
)

// endpoint is a listener with what will answer on it.
type endpoint struct {
	listener net.Listener
	handler  func(*Agent) http.Handler
}

// openEndpoints opens the admin socket, and metrics and readiness where they are
// not off. They are open before anything is captured, so that a clash ends the
// start early; they answer when everything is there.
func (a *Agent) openEndpoints(closers *stack) ([]endpoint, error) {
	ln, err := admin.Listen(a.settings.AdminSocket)
	if err != nil {
		return nil, err
	}
	closers.push("admin socket", closed(ln))
	ends := []endpoint{{ln, func(a *Agent) http.Handler { return admin.Handler(a) }}}
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
		ln, err := net.Listen("tcp", e.listen)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: free the port, or set %s.listen to another one or to off", e.key, err, e.key)
		}
		closers.push(e.key, closed(ln))
		ends = append(ends, endpoint{ln, e.handler})
	}
	return ends, nil
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
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if srv.Shutdown(bound) != nil {
			srv.Close()
		}
	}()
	err := srv.Serve(ln)
	if errors.Is(err, http.ErrServerClosed) {
		<-stopped
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
