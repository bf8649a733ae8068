package tunnel_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/net/http2"

	"ringfence.dev/proxy/tunnel"
)

func TestExchange(t *testing.T) {
	c, s := pair(t, echoing)
	st, k := open(t, c)
	defer st.Close()
	if k.status != 200 {
		t.Fatalf("status %d", k.status)
	}
	if c.Peer() != serverID || s.Peer() != clientID {
		t.Errorf("peers are %s and %s", c.Peer(), s.Peer())
	}
	if who, port := s.Shown(); who != serverID || port != 80 {
		t.Errorf("server showed %s for port %d", who, port)
	}
	if got := s.request(0); got.Authority != "127.0.0.1:80" || got.Decision != "d" || got.Forwarded != `for="127.0.0.1:9"` || !got.Connect() {
		t.Errorf("request = %+v", got)
	}
	if err := st.WriteAll([][]byte{[]byte("hello, "), nil, []byte("world")}); err != nil {
		t.Fatal(err)
	}
	k.wait(t, "the echo", func() bool { return k.data.String() == "hello, world" })
	if err := st.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	k.wait(t, "the end", func() bool { return k.ended })
}

// Every size around the edges of records, frames and buffers comes through whole.
func TestSizesAndOrder(t *testing.T) {
	c, _ := pair(t, echoing)
	rnd := rand.New(rand.NewPCG(1, 2))
	var want bytes.Buffer
	st, k := open(t, c)
	defer st.Close()
	for _, n := range []int{1, 2, 8191, 8192, 8193, 16383, 16384, 16385, 65527, 65536, 65537, 200_000, 1_000_000} {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		cut := rnd.IntN(n)
		want.Write(p)
		if err := st.WriteAll([][]byte{p[:cut], p[cut:]}); err != nil {
			t.Fatal(err)
		}
	}
	_ = st.CloseWrite()
	k.wait(t, "the end", func() bool { return k.ended })
	if !bytes.Equal(k.data.Bytes(), want.Bytes()) {
		t.Errorf("echo differs: %d octets, want %d", k.data.Len(), want.Len())
	}
}

func TestManyStreamsAtOnce(t *testing.T) {
	c, _ := pair(t, echoing)
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			for j := range 10 {
				st, k := open(t, c)
				text := fmt.Sprintf("stream %d round %d", i, j)
				if err := st.WriteAll([][]byte{[]byte(text)}); err != nil {
					t.Error(err)
				}
				_ = st.CloseWrite()
				k.wait(t, "the echo and its end", func() bool { return k.ended })
				if got := k.data.String(); got != text {
					t.Errorf("got %q, want %q", got, text)
				}
				st.Close()
			}
		})
	}
	wg.Wait()
	if n := c.Streams(); n != 0 {
		t.Errorf("%d streams are left", n)
	}
}

func TestHalfCloseBothOrders(t *testing.T) {
	t.Run("client first", func(t *testing.T) {
		c, s := pair(t, nil)
		st, k := open(t, c)
		defer st.Close()
		_ = st.CloseWrite()
		farStream, far := s.at(0)
		far.wait(t, "the client's end", func() bool { return far.ended })
		if err := farStream.WriteAll([][]byte{[]byte("late")}); err != nil {
			t.Fatal(err)
		}
		_ = farStream.CloseWrite()
		k.wait(t, "the server's end", func() bool { return k.ended })
		if k.data.String() != "late" {
			t.Errorf("got %q", k.data.String())
		}
	})
	t.Run("server first", func(t *testing.T) {
		c, s := pair(t, nil)
		st, k := open(t, c)
		defer st.Close()
		farStream, far := s.at(0)
		_ = farStream.CloseWrite()
		k.wait(t, "the server's end", func() bool { return k.ended })
		if err := st.WriteAll([][]byte{[]byte("late")}); err != nil {
			t.Fatal(err)
		}
		_ = st.CloseWrite()
		far.wait(t, "the client's end", func() bool { return far.ended })
		if far.data.String() != "late" {
			t.Errorf("got %q", far.data.String())
		}
	})
}

func TestResetReachesPeerAndEndsWriters(t *testing.T) {
	c, s := pair(t, nil)
	st, k := open(t, c)
	farStream, far := s.at(0)
	far.mu.Lock()
	far.stalled = true
	far.discard = true
	far.mu.Unlock()
	wrote := make(chan error, 1)
	go func() { wrote <- st.WriteAll([][]byte{make([]byte, 10<<20)}) }() // more than any credit
	far.wait(t, "the window to fill", func() bool { return far.held >= 256<<10 })
	farStream.Reset(http2.ErrCodeCancel)
	if err := <-wrote; err == nil {
		t.Error("the writer did not notice")
	}
	k.wait(t, "the reset", func() bool { return k.reset != nil })
	var se *tunnel.StreamError
	if !errors.As(k.reset, &se) || !se.Remote || se.Code != http2.ErrCodeCancel {
		t.Errorf("reset = %v", k.reset)
	}
	if s.Unread() != 0 {
		t.Errorf("%d octets count as unread after the reset", s.Unread())
	}
	st.Close()
}

// Readers that stall stop themselves only: the rest of the tunnel goes on at
// full speed, and what waits for them is bounded by their credit.
func TestStalledReadersDoNotSlowNeighbours(t *testing.T) {
	c, s := pair(t, func(st *tunnel.Stream, _ *tunnel.Request, k *sink) {
		k.mu.Lock()
		k.stalled = true
		k.mu.Unlock()
		st.Respond(200)
	})
	var writers sync.WaitGroup
	var stalled []*tunnel.Stream
	for range 50 {
		st, _ := open(t, c)
		stalled = append(stalled, st)
		writers.Go(func() { _ = st.WriteAll([][]byte{make([]byte, 1<<20)}) })
	}
	for i := range 50 {
		_, k := s.at(i)
		k.wait(t, "a window to fill", func() bool { return k.held == 256<<10 })
	}
	if got := s.Unread(); got != 50*256<<10 {
		t.Errorf("%d octets wait for stalled readers, want exactly their credit", got)
	}
	s.mu.Lock()
	s.accept = echoing
	s.mu.Unlock()
	st, k := open(t, c)
	k.mu.Lock()
	k.discard = true
	k.mu.Unlock()
	if err := st.WriteAll([][]byte{make([]byte, 8<<20)}); err != nil {
		t.Fatal(err)
	}
	k.wait(t, "the neighbour's echo", func() bool { return k.count == 8<<20 })
	st.Close()
	for _, st := range stalled {
		st.Close()
	}
	writers.Wait()
}

func TestCreditGrowsWithTheReader(t *testing.T) {
	c, s := pair(t, func(st *tunnel.Stream, _ *tunnel.Request, k *sink) {
		k.mu.Lock()
		k.discard = true
		k.mu.Unlock()
		st.Respond(200)
	})
	st, _ := open(t, c)
	defer st.Close()
	if err := st.WriteAll([][]byte{make([]byte, 32<<20)}); err != nil {
		t.Fatal(err)
	}
	_, far := s.at(0)
	far.wait(t, "all octets", func() bool { return far.count == 32<<20 })
	far.mu.Lock()
	far.stalled = true
	far.mu.Unlock()
	wrote := make(chan struct{})
	go func() { defer close(wrote); _ = st.WriteAll([][]byte{make([]byte, 32<<20)}) }()
	// It now takes more than it was given at first, and no more than the bound.
	far.wait(t, "a grown window to fill", func() bool { return far.held > 256<<10 })
	st.Reset(http2.ErrCodeCancel)
	<-wrote
	far.wait(t, "the reset", func() bool { return far.reset != nil })
	if far.held > 4<<20 {
		t.Errorf("%d octets in flight", far.held)
	}
}

func TestRefusalsByStatus(t *testing.T) {
	for _, status := range []int{400, 401, 503} {
		c, _ := pair(t, func(st *tunnel.Stream, _ *tunnel.Request, _ *sink) {
			st.Respond(status)
			st.Close()
		})
		st, k := open(t, c)
		k.wait(t, "the end", func() bool { return k.ended || k.reset != nil })
		if k.status != status {
			t.Errorf("status %d, want %d", k.status, status)
		}
		st.Close()
		if err := c.Err(); err != nil {
			t.Errorf("the refusal ended the tunnel: %v", err)
		}
	}
}

// A server that is going away lets streams end, and the tunnel ends with them.
func TestGoAwayDrains(t *testing.T) {
	c, s := pair(t, echoing)
	st, k := open(t, c)
	s.GoAway()
	if err := st.WriteAll([][]byte{[]byte("still here")}); err != nil {
		t.Fatal(err)
	}
	k.wait(t, "the echo", func() bool { return k.data.String() == "still here" })
	for !c.Draining() {
		// GOAWAY was written before the echo, so the reader has seen it.
		t.Fatal("the client was not told")
	}
	if err := c.Reserve(100); !errors.Is(err, tunnel.ErrDraining) {
		t.Errorf("Reserve = %v", err)
	}
	_ = st.CloseWrite()
	k.wait(t, "the end", func() bool { return k.ended })
	st.Close()
	<-c.Done()
	<-s.down
	if s.err != nil || c.Err() == nil {
		t.Errorf("ended with %v and %v", s.err, c.Err())
	}
	if k.reset != nil {
		t.Errorf("the stream was reset: %v", k.reset)
	}
}

func TestIdleGoAwayEndsAtOnce(t *testing.T) {
	c, s := pair(t, nil)
	s.GoAway()
	<-s.down
	<-c.Done()
}

func TestCloseResetsStreams(t *testing.T) {
	c, s := pair(t, nil)
	_, k := open(t, c)
	s.Close()
	k.wait(t, "the reset", func() bool { return k.reset != nil })
	<-c.Done()
	if err := c.Reserve(1); !errors.Is(err, tunnel.ErrDraining) {
		t.Errorf("Reserve on a dead tunnel: %v", err)
	}
}
