package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
)

// ErrNotRunning reports that nothing answers on the admin socket.
var ErrNotRunning = errors.New("no agent is running")

// maxAnswer bounds what a client reads, 256 MiB: a status with 100,000 connections takes 40.
const maxAnswer = 256 << 20

// Client talks to one agent. It is safe for concurrent use.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the agent whose admin socket is at path. Nothing is dialled yet.
func NewClient(path string) *Client {
	var d net.Dialer
	return &Client{socket: path, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		},
		DisableKeepAlives: true,
	}, CheckRedirect: func(*http.Request, []*http.Request) error {
		// The server redirects nobody. A path that it cleans was no path of ours, and
		// what it would be led to is another question than the one asked.
		return http.ErrUseLastResponse
	}}}
}

// Path joins segments into a path of the interface, each taken as it is: a slash
// in one of them separates nothing. A segment that a path cannot carry is an error.
func Path(segments ...string) (string, error) {
	var b strings.Builder
	for _, s := range segments {
		if s == "" || s == "." || s == ".." {
			return "", fmt.Errorf("%q is no name", s)
		}
		b.WriteString("/" + url.PathEscape(s))
	}
	return b.String(), nil
}

// Get asks for path, which is escaped, and decodes the answer into out, a pointer, or discards it when out is nil.
func (c *Client) Get(ctx context.Context, path string, query url.Values, out any) error {
	return c.do(ctx, http.MethodGet, path, query, nil, out)
}

// Do sends body as JSON, nothing when body is nil, and decodes the answer into out.
func (c *Client) Do(ctx context.Context, method, path string, query url.Values, body, out any) error {
	return c.do(ctx, method, path, query, body, out)
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, body, out any) error {
	u, err := url.Parse("http://agent" + path)
	if err != nil {
		return fmt.Errorf("ask the agent for %q: %w", path, err)
	}
	if len(query) > 0 {
		u.RawQuery = query.Encode()
	}
	var in io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		in = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), in)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	if len(data) > maxAnswer {
		return fmt.Errorf("the agent's answer is longer than %d bytes", maxAnswer)
	}
	if resp.StatusCode/100 != 2 {
		var e Error
		if json.Unmarshal(data, &e) != nil || e.Error == "" {
			e.Error = resp.Status
		}
		return errors.New(e.Error)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("the agent's answer is not what this command expects (another version?): %w", err)
	}
	return nil
}

func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("open admin socket %s: permission denied: run as root", c.socket)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w on %s: start one with `ringfence agent`, or name its socket with --socket", ErrNotRunning, c.socket)
	default:
		return err
	}
}
