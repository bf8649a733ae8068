package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/pprof"
	"strconv"

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
	Decisions(f Filter) (any, error)
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
		raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxScope))
		if err == nil && !json.Valid(raw) {
			err = errors.New("not one JSON value")
		}
		if err != nil {
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
		answer(w, r, b.Decisions)
	})
	mux.HandleFunc("GET /v1/explain", func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, b.Explain)
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

// maxScope bounds the settings of one scope: thousands of patterns.
const maxScope = 64 << 10

// answer asks about the decisions that a request's query chooses.
func answer(w http.ResponseWriter, r *http.Request, ask func(Filter) (any, error)) {
	f, err := filter(r)
	if err != nil {
		fail(w, BadRequest{err})
		return
	}
	out, err := ask(f)
	if err != nil {
		fail(w, err)
		return
	}
	reply(w, http.StatusOK, out)
}

// defaultLimit is how many decisions are listed unless told otherwise.
const defaultLimit = 100

func filter(r *http.Request) (Filter, error) {
	q := r.URL.Query()
	f := Filter{ID: q.Get("id"), Unit: q.Get("unit"), Scope: q.Get("scope"), Effect: q.Get("effect"), Limit: defaultLimit}
	if text := q.Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			return f, fmt.Errorf("limit %q is no number of decisions", text)
		}
		f.Limit = n
	}
	return f, nil
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
