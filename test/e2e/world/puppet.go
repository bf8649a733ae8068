package world

import (
	"errors"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// Puppet is a process in a unit of a host, and so with that unit's identity,
// that does with sockets what the test says: it stands for any program.
type Puppet struct {
	w   *World
	rpc *rpc.Client
	cmd *exec.Cmd
}

// pipes joins what a child reads and writes.
type pipes struct {
	io.ReadCloser
	io.WriteCloser
}

func (p pipes) Close() error { return errors.Join(p.WriteCloser.Close(), p.ReadCloser.Close()) }

// Puppet starts a puppet, which ends with the test.
func (w *World) Puppet(host, unit string) *Puppet {
	w.T.Helper()
	cmd := exec.Command(os.Args[0], puppetArg)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	log, err3 := os.Create(filepath.Join(w.Files, unit+".log"))
	if err := errors.Join(err1, err2, err3); err != nil {
		w.T.Fatal(err)
	}
	cmd.Stderr = log
	defer log.Close()
	if err := w.Lab.Start(host, unit, cmd); err != nil {
		w.T.Fatal(err)
	}
	p := &Puppet{w, rpc.NewClient(pipes{out, in}), cmd}
	w.T.Cleanup(p.End)
	return p
}

// In is the puppet in the hands of a subtest, whose failures are its own. The
// puppet ends with the test that started it.
func (p *Puppet) In(t testing.TB) *Puppet {
	sub, w := *p, *p.w
	w.T = t
	sub.w = &w
	return &sub
}

// PID is the puppet's process id.
func (p *Puppet) PID() int { return p.cmd.Process.Pid }

// End ends the puppet; its sockets close.
func (p *Puppet) End() {
	_ = p.rpc.Close()
	end(p.cmd)
}

func (p *Puppet) call(method string, in Call) (out Answer, err error) {
	if err := p.rpc.Call("Puppet."+method, in, &out); err != nil {
		return out, err
	}
	switch {
	case out.Errno != 0:
		return out, out.Errno
	case out.EOF:
		return out, io.EOF
	case out.Timeout:
		return out, os.ErrDeadlineExceeded
	case out.Failed != "":
		return out, errors.New(out.Failed)
	}
	return out, nil
}

func (p *Puppet) must(method string, in Call) Answer {
	p.w.T.Helper()
	out, err := p.call(method, in)
	if err != nil {
		p.w.T.Fatalf("%s %+v: %v", method, in, err)
	}
	return out
}

// Conn is a TCP connection of a puppet. Errors are those of the puppet's
// system calls: [io.EOF], a [syscall.Errno], or [os.ErrDeadlineExceeded].
type Conn struct {
	p  *Puppet
	id int
	// Local and Remote are the addresses that the puppet's program sees.
	Local, Remote string
}

// Dial connects; nothing waits for more than 15 seconds.
func (p *Puppet) Dial(addr string) (*Conn, error) {
	a, err := p.call("Dial", Call{Addr: addr})
	if err != nil {
		return nil, err
	}
	return &Conn{p, a.ID, a.Local, a.Remote}, nil
}

// MustDial connects or fails the test.
func (p *Puppet) MustDial(addr string) *Conn {
	p.w.T.Helper()
	c, err := p.Dial(addr)
	if err != nil {
		p.w.T.Fatalf("dial %s: %v", addr, err)
	}
	return c
}

// Listener is a listening socket of a puppet.
type Listener struct {
	p  *Puppet
	id int
}

// Listen listens on a TCP address.
func (p *Puppet) Listen(addr string) *Listener {
	p.w.T.Helper()
	return &Listener{p, p.must("Listen", Call{Addr: addr}).ID}
}

// In is the listener in the hands of a subtest.
func (l *Listener) In(t testing.TB) *Listener { return &Listener{l.p.In(t), l.id} }

// Accept waits for a connection for at most 15 seconds.
func (l *Listener) Accept() (*Conn, error) { return l.AcceptWithin(15 * time.Second) }

// AcceptWithin waits for a connection for a time.
func (l *Listener) AcceptWithin(d time.Duration) (*Conn, error) {
	a, err := l.p.call("Accept", Call{ID: l.id, Wait: d})
	if err != nil {
		return nil, err
	}
	return &Conn{l.p, a.ID, a.Local, a.Remote}, nil
}

// MustAccept accepts or fails the test.
func (l *Listener) MustAccept() *Conn {
	l.p.w.T.Helper()
	c, err := l.Accept()
	if err != nil {
		l.p.w.T.Fatalf("accept: %v", err)
	}
	return c
}

// Close closes the listening socket.
func (l *Listener) Close() { l.p.must("CloseListener", Call{ID: l.id}) }

// Read reads what is there, waiting for at most 15 seconds.
func (c *Conn) Read(b []byte) (int, error) { return c.ReadWithin(b, 15*time.Second) }

// ReadWithin reads what is there, waiting for a time.
func (c *Conn) ReadWithin(b []byte, d time.Duration) (int, error) {
	a, err := c.p.call("Read", Call{ID: c.id, Max: len(b), Wait: d})
	return copy(b, a.Data), err
}

// Write writes all of b, waiting for at most 15 seconds.
func (c *Conn) Write(b []byte) (int, error) {
	if _, err := c.p.call("Write", Call{ID: c.id, Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Send writes text or fails the test.
func (c *Conn) Send(text string) {
	c.p.w.T.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		c.p.w.T.Fatalf("send %.40q: %v", text, err)
	}
}

// SendBytewise writes text one byte at a time, each in a packet of its own.
func (c *Conn) SendBytewise(text string) {
	c.p.w.T.Helper()
	c.p.must("WriteBytewise", Call{ID: c.id, Data: []byte(text)})
}

// Want reads exactly text or fails the test.
func (c *Conn) Want(text string) {
	c.p.w.T.Helper()
	b := make([]byte, len(text))
	n, err := io.ReadFull(c, b)
	if string(b[:n]) != text {
		c.p.w.T.Fatalf("read %q (%v), want %q", b[:n], err, text)
	}
}

// Rest reads to the end and returns what came, with the error that ended it if
// it was not the end of the stream.
func (c *Conn) Rest() (string, error) {
	b, err := io.ReadAll(c)
	return string(b), err
}

// CloseWrite sends a FIN.
func (c *Conn) CloseWrite() { c.p.w.T.Helper(); c.p.must("CloseWrite", Call{ID: c.id}) }

// TryCloseWrite sends a FIN on a connection that may be cut already.
func (c *Conn) TryCloseWrite() error {
	_, err := c.p.call("CloseWrite", Call{ID: c.id})
	return err
}

// Reset sends an RST.
func (c *Conn) Reset() { c.p.w.T.Helper(); c.p.must("Reset", Call{ID: c.id}) }

// Close closes the connection.
func (c *Conn) Close() error {
	_, err := c.p.call("Close", Call{ID: c.id})
	return err
}

// Echo answers on an address with what it is sent, until each client's FIN.
func (p *Puppet) Echo(addr string) { p.w.T.Helper(); p.must("Echo", Call{Addr: addr}) }

// Burst makes n connections to the addresses in turn, so many at once, exchanges
// a byte on each and closes it. The result counts those that worked.
func (p *Puppet) Burst(addrs []string, n, atOnce int) (int, error) {
	a, err := p.call("Burst", Call{Addrs: addrs, Max: n, AtOnce: atOnce})
	return a.ID, err
}

// Hold accepts connections on an address, reads each to its end, and keeps it.
func (p *Puppet) Hold(addr string) { p.w.T.Helper(); p.must("Hold", Call{Addr: addr}) }

// HalfClose makes n connections to the addresses in turn, ends the sending half
// of each, and keeps it.
func (p *Puppet) HalfClose(addrs []string, n int) {
	p.w.T.Helper()
	p.must("HalfClose", Call{Addrs: addrs, Max: n})
}

// Held counts the connections that are kept, at a server those read to their end.
func (p *Puppet) Held() int { p.w.T.Helper(); return p.must("Held", Call{}).ID }

// Drop closes the connections that are kept.
func (p *Puppet) Drop() { p.w.T.Helper(); p.must("Drop", Call{}) }

// Web serves HTTP with Go's own server, see [webHandler].
func (p *Puppet) Web(addr string) { p.w.T.Helper(); p.must("Web", Call{Addr: addr}) }

// Seen lists the requests that a puppet's web server has got, as method, space and target.
func (p *Puppet) Seen() []string { p.w.T.Helper(); return p.must("Seen", Call{}).Texts }
