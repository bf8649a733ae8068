package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
)

// serveEndpoints opens metrics and readiness, where they are not off.
func (a *Agent) serveEndpoints(ctx context.Context, g *errgroup.Group) error {
	for _, e := range []struct {
		key, listen string
		handler     http.Handler
	}{
		{"metrics", a.settings.MetricsListen, a.metricsHandler()},
		{"readiness", a.settings.ReadinessListen, a.readinessHandler()},
	} {
		if e.listen == "" {
			continue
		}
		ln, err := net.Listen("tcp", e.listen)
		if err != nil {
			return fmt.Errorf("%s: %w: free the port, or set %s.listen to another one or to off", e.key, err, e.key)
		}
		g.Go(func() error { return serveHTTP(ctx, ln, e.handler) })
	}
	return nil
}

// serveHTTP serves until ctx ends; running requests get a second to finish.
func serveHTTP(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
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

// followSignals reloads the policies on SIGHUP.
func (a *Agent) followSignals(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
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
