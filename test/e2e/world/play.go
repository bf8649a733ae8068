package world

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// puppetArg makes the test binary play a puppet.
const puppetArg = "play-a-puppet"

// Call is what a puppet is told.
type Call struct {
	ID     int
	Addr   string
	Addrs  []string
	Data   []byte
	Max    int
	AtOnce int
	Wait   time.Duration
}

// Answer is what became of it.
type Answer struct {
	ID            int
	Local, Remote string
	Data          []byte
	Texts         []string
	// At most one of these says what went wrong.
	Errno   syscall.Errno
	EOF     bool
	Timeout bool
	Failed  string
}

func (a *Answer) fail(err error) {
	var errno syscall.Errno
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		a.EOF = true
	case errors.As(err, &errno):
		a.Errno = errno
	case errors.Is(err, os.ErrDeadlineExceeded):
		a.Timeout = true
	default:
		a.Failed = err.Error()
	}
}

// patience bounds every wait of a puppet that the call does not bound.
const patience = 15 * time.Second

// puppet is the puppet's own side: a table of sockets.
type puppet struct {
	mu        sync.Mutex // held: the tables do not change
	last      int
	conns     map[int]*net.TCPConn
	listeners map[int]*net.TCPListener
	held      []*net.TCPConn
	web       web
}

// play serves calls on the standard streams until they end, and with them the test.
func play() int {
	s := rpc.NewServer()
	p := &puppet{conns: map[int]*net.TCPConn{}, listeners: map[int]*net.TCPListener{}}
	if err := s.RegisterName("Puppet", p); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	s.ServeConn(pipes{os.Stdin, os.Stdout})
	return 0
}

func (p *puppet) keep(c net.Conn, out *Answer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last++
	p.conns[p.last] = c.(*net.TCPConn)
	out.ID, out.Local, out.Remote = p.last, c.LocalAddr().String(), c.RemoteAddr().String()
}

// conn finds a connection; one that is closed already is found as a closed one.
func (p *puppet) conn(id int) *net.TCPConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.conns[id]; c != nil {
		return c
	}
	return new(net.TCPConn)
}

// Dial connects.
func (p *puppet) Dial(in Call, out *Answer) error {
	c, err := net.DialTimeout("tcp", in.Addr, patience)
	if err != nil {
		var op net.Error
		if errors.As(err, &op) && op.Timeout() {
			err = os.ErrDeadlineExceeded
		}
		out.fail(err)
		return nil
	}
	p.keep(c, out)
	return nil
}

// Listen listens.
func (p *puppet) Listen(in Call, out *Answer) error {
	l, err := net.Listen("tcp", in.Addr)
	if err != nil {
		out.fail(err)
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last++
	p.listeners[p.last], out.ID = l.(*net.TCPListener), p.last
	return nil
}

// Accept takes the next connection of a listener.
func (p *puppet) Accept(in Call, out *Answer) error {
	p.mu.Lock()
	l := p.listeners[in.ID]
	p.mu.Unlock()
	_ = l.SetDeadline(time.Now().Add(in.Wait))
	c, err := l.Accept()
	if err != nil {
		out.fail(err)
		return nil
	}
	p.keep(c, out)
	return nil
}

// CloseListener closes a listening socket.
func (p *puppet) CloseListener(in Call, out *Answer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	out.fail(p.listeners[in.ID].Close())
	return nil
}

// Read reads once.
func (p *puppet) Read(in Call, out *Answer) error {
	c := p.conn(in.ID)
	_ = c.SetReadDeadline(time.Now().Add(in.Wait))
	out.Data = make([]byte, min(in.Max, 1<<20))
	n, err := c.Read(out.Data)
	out.Data = out.Data[:n]
	out.fail(err)
	return nil
}

// Write writes all.
func (p *puppet) Write(in Call, out *Answer) error {
	c := p.conn(in.ID)
	_ = c.SetWriteDeadline(time.Now().Add(patience))
	_, err := c.Write(in.Data)
	out.fail(err)
	return nil
}

// WriteBytewise writes all, each byte alone; Go sets TCP_NODELAY.
func (p *puppet) WriteBytewise(in Call, out *Answer) error {
	c := p.conn(in.ID)
	_ = c.SetWriteDeadline(time.Now().Add(patience))
	for i := range in.Data {
		if _, err := c.Write(in.Data[i : i+1]); err != nil {
			out.fail(err)
			return nil
		}
	}
	return nil
}

// CloseWrite ends the sending half.
func (p *puppet) CloseWrite(in Call, out *Answer) error {
	out.fail(p.conn(in.ID).CloseWrite())
	return nil
}

// Reset cuts the connection.
func (p *puppet) Reset(in Call, out *Answer) error {
	c := p.conn(in.ID)
	out.fail(errors.Join(c.SetLinger(0), c.Close()))
	p.forget(in.ID)
	return nil
}

// Close closes the connection.
func (p *puppet) Close(in Call, out *Answer) error {
	out.fail(p.conn(in.ID).Close())
	p.forget(in.ID)
	return nil
}

func (p *puppet) forget(id int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, id)
}

// Echo starts an echo server.
func (p *puppet) Echo(in Call, out *Answer) error {
	l, err := net.Listen("tcp", in.Addr)
	out.fail(err)
	if err == nil {
		go echo(l)
	}
	return nil
}

func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}()
	}
}

// Burst makes many short connections.
func (p *puppet) Burst(in Call, out *Answer) error {
	var next, worked atomic.Int64
	var wg sync.WaitGroup
	var first sync.Once
	for range in.AtOnce {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(in.Max); i = next.Add(1) {
				if err := oneByte(in.Addrs[int(i)%len(in.Addrs)]); err != nil {
					first.Do(func() { out.Failed = fmt.Sprintf("connection %d: %v", i, err) })
				} else {
					worked.Add(1)
				}
			}
		})
	}
	wg.Wait()
	out.ID = int(worked.Load())
	return nil
}

// oneByte is a short connection, closed by the client, to its end.
func oneByte(addr string) error {
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	var b [1]byte
	if _, err := c.Write([]byte("x")); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	return nil
}

// Hold starts a server that keeps what is read to its end.
func (p *puppet) Hold(in Call, out *Answer) error {
	l, err := net.Listen("tcp", in.Addr)
	out.fail(err)
	if err != nil {
		return nil
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				if _, err := io.Copy(io.Discard, c); err == nil {
					p.hold(c)
				}
			}()
		}
	}()
	return nil
}

func (p *puppet) hold(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = append(p.held, c.(*net.TCPConn))
}

// HalfClose makes connections whose sending half has ended.
func (p *puppet) HalfClose(in Call, out *Answer) error {
	for i := range in.Max {
		c, err := net.DialTimeout("tcp", in.Addrs[i%len(in.Addrs)], patience)
		if err == nil {
			_, err = c.Write([]byte("x"))
		}
		if err == nil {
			err = c.(*net.TCPConn).CloseWrite()
		}
		if err != nil {
			out.Failed = fmt.Sprintf("connection %d: %v", i, err)
			return nil
		}
		p.hold(c)
	}
	return nil
}

// Held counts.
func (p *puppet) Held(_ Call, out *Answer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	out.ID = len(p.held)
	return nil
}

// Drop closes what is held.
func (p *puppet) Drop(_ Call, _ *Answer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.held {
		_ = c.Close()
	}
	p.held = nil
	return nil
}
