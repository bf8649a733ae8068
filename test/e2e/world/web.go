package world

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
)

// web is what a puppet's web server has seen.
type web struct {
	mu   sync.Mutex // held: seen does not change
	seen []string
}

// SeenRequest is what [Puppet.Web] answers with by default: the request as it reached the server.
type SeenRequest struct {
	Method, Target, Host, Remote, Proto string
	Header, Trailer                     http.Header
	Body                                string
}

// Web starts the server.
func (p *puppet) Web(in Call, out *Answer) error {
	l, err := net.Listen("tcp", in.Addr)
	out.fail(err)
	if err == nil {
		go func() { _ = (&http.Server{Handler: p.web.handler()}).Serve(l) }()
	}
	return nil
}

// Seen lists the requests so far.
func (p *puppet) Seen(_ Call, out *Answer) error {
	p.web.mu.Lock()
	defer p.web.mu.Unlock()
	out.Texts = append(out.Texts, p.web.seen...)
	return nil
}

// handler answers /bytes/N with N bytes, /status/N with that status and no body, /chunked with three chunks
// and a trailer, /slow with a byte for each byte that the client sends, and all else with a SeenRequest.
func (w *web) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/bytes/{n}", func(rw http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.PathValue("n"))
		rw.Header().Set("Content-Length", strconv.Itoa(n))
		_, _ = io.CopyN(rw, zeros{}, int64(n))
	})
	mux.HandleFunc("/status/{n}", func(rw http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.PathValue("n"))
		rw.Header().Set("ETag", `"three lamps"`)
		rw.WriteHeader(n)
	})
	mux.HandleFunc("/chunked", func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Trailer", "X-Sum")
		for i := range 3 {
			fmt.Fprintf(rw, "chunk %d\n", i)
			_ = http.NewResponseController(rw).Flush()
		}
		rw.Header().Set("X-Sum", "3")
	})
	mux.HandleFunc("/slow", func(rw http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(rw)
		_ = c.EnableFullDuplex()
		_ = c.Flush()
		b := make([]byte, 1)
		for {
			if _, err := r.Body.Read(b); err != nil {
				return
			}
			_, _ = rw.Write(b)
			_ = c.Flush()
		}
	})
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.seen = append(w.seen, r.Method+" "+r.RequestURI)
		w.mu.Unlock()
		// Asked first, because the mux redirects what has another spelling.
		if _, pattern := mux.Handler(r); pattern != "" {
			mux.ServeHTTP(rw, r)
			return
		}
		body, _ := io.ReadAll(r.Body)
		_ = json.NewEncoder(rw).Encode(SeenRequest{r.Method, r.RequestURI, r.Host, r.RemoteAddr, r.Proto, r.Header, r.Trailer, string(body)})
	})
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
