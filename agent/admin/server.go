package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"ringfence.dev/policy/authz"
)

// Backend is what the server shows and steers. [ErrNotFound] becomes 404, a
// [BadRequest] 400, every other error 500.
type Backend interface {
	Status(ctx context.Context) Status
	// Ready returns nil, or why the agent cannot do its work.
	Ready() error
	AddScope(ctx context.Context, raw json.RawMessage) error
	RemoveScope(ctx context.Context, name string) error
	SetMode(ctx context.Context, name string, m authz.Mode) error
	ReloadPolicy(ctx context.Context) error
	// Decisions returns the newest records first, as JSON values.
	Decisions(f Filter) any
	// Explain returns the full account of one recorded decision.
	Explain(f Filter) (any, error)
	ClearPeer(addr string) error
	// Check walks the path to a peer and reports step by step.
	Check(ctx context.Context, scope, peer string) (any, error)
	// Collect frees what memory can be freed and returns the status's resources anew.
	Collect() Resources
}

// Filter selects recorded decisions. Zero fields select all.
type Filter struct {
	ID     string
	Unit   string
	Scope  string
	Effect string
	Limit  int
}

// ErrNotFound reports a name or id that the agent does not know.
var ErrNotFound = errors.New("not found")

// BadRequest is a caller's mistake.
type BadRequest struct{ Err error }

func (b BadRequest) Error() string { return b.Err.Error() }
func (b BadRequest) Unwrap() error { return b.Err }

// Listen opens the admin socket at path with mode 0600, its directory with 0700
// if it has to be made. A socket that a dead agent left is replaced; one that
// answers is an error.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make the admin socket's directory: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("another agent answers on %s: stop it first, or set another instance and admin.socket", path)
	} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("admin socket %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the stale admin socket: %w", err)
	}
	// The mask makes the socket 0600 from its first moment; a chmod afterwards would leave a gap.
	old := syscall.Umask(0o177)
	ln, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("open the admin socket: %w", err)
	}
	return ln, nil
}

// Handler serves b.
func Handler(b Backend) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := b.Ready(); err != nil {
			reply(w, http.StatusServiceUnavailable, Error{err.Error()})
			return
		}
		reply(w, http.StatusOK, map[string]bool{"ready": true})
	})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, b.Status(r.Context()))
	})
	mux.HandleFunc("POST /v1/scopes", func(w http.ResponseWriter, r *http.Request) {
		var raw json.RawMessage
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&raw); err != nil {
			fail(w, BadRequest{fmt.Errorf("read scope: %w", err)})
			return
		}
		done(w, b.AddScope(r.Context(), raw))
	})
	mux.HandleFunc("DELETE /v1/scopes/{name}", func(w http.ResponseWriter, r *http.Request) {
		done(w, b.RemoveScope(r.Context(), r.PathValue("name")))
	})
	mux.HandleFunc("PUT /v1/scopes/{name}/mode/{mode}", func(w http.ResponseWriter, r *http.Request) {
		var m authz.Mode
		if err := m.UnmarshalText([]byte(r.PathValue("mode"))); err != nil {
			fail(w, BadRequest{err})
			return
		}
		done(w, b.SetMode(r.Context(), r.PathValue("name"), m))
	})
	mux.HandleFunc("POST /v1/policy/reload", func(w http.ResponseWriter, r *http.Request) {
		done(w, b.ReloadPolicy(r.Context()))
	})
	mux.HandleFunc("GET /v1/decisions", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, b.Decisions(filter(r)))
	})
	mux.HandleFunc("GET /v1/explain", func(w http.ResponseWriter, r *http.Request) {
		out, err := b.Explain(filter(r))
		if err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, out)
	})
	mux.HandleFunc("DELETE /v1/peers/{addr}", func(w http.ResponseWriter, r *http.Request) {
		done(w, b.ClearPeer(r.PathValue("addr")))
	})
	mux.HandleFunc("GET /v1/check", func(w http.ResponseWriter, r *http.Request) {
		out, err := b.Check(r.Context(), r.URL.Query().Get("scope"), r.URL.Query().Get("peer"))
		if err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, out)
	})
	mux.HandleFunc("POST /v1/memory/collect", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, b.Collect())
	})
	// Only root can open the socket, so profiles are always at hand.
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

func filter(r *http.Request) Filter {
	q := r.URL.Query()
	f := Filter{ID: q.Get("id"), Unit: q.Get("unit"), Scope: q.Get("scope"), Effect: q.Get("effect"), Limit: 100}
	if n := q.Get("limit"); n != "" {
		_, _ = fmt.Sscanf(n, "%d", &f.Limit) // a malformed limit keeps the default
	}
	return f
}

func done(w http.ResponseWriter, err error) {
	if err != nil {
		fail(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func fail(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	var bad BadRequest
	switch {
	case errors.As(err, &bad):
		status = http.StatusBadRequest
	case errors.Is(err, ErrNotFound):
		status = http.StatusNotFound
	}
	reply(w, status, Error{err.Error()})
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // the caller has gone if this fails
}
