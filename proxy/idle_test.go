package proxy_test

import (
	"net"
	"runtime"
	"testing"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/proxytest"
)

// An idle connection holds no buffer: what it costs both agents, with the test's own
// sockets, goroutines and service, is bounded.
func TestIdleConnectionsAreSmall(t *testing.T) {
	a, b := pair(t, authz.Enforce, proxytest.Policy{}, proxytest.Policy{})
	a.dec.Quiet()
	b.dec.Quiet()
	to := b.service(t, "b/sa/echo", echo)
	const n = 400
	var conns []net.Conn
	dial := func() {
		c := a.dial(t, to)
		exchange(t, c, "\x00opaque")
		conns = append(conns, c)
	}
	for range 100 { // the tunnel and the pools
		dial()
	}
	before := inUse()
	for range n {
		dial()
	}
	per := (inUse() - before) / n
	t.Logf("%d octets per idle connection, on both agents and in the test", per)
	if per > 28<<10 {
		t.Errorf("%d octets per idle connection", per)
	}
}

// inUse is heap and stacks after a collection.
func inUse() uint64 {
	var m runtime.MemStats
	for range 2 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
