package traffic_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"ringfence.dev/agent/admin"
	"ringfence.dev/test/e2e/world"
	"ringfence.dev/test/nettest"
	"ringfence.dev/tools/ringfence/lab"
)

// load is how much a way of capturing is put to.
type load struct{ short, half int }

// In iptables mode each connection costs a search through the descriptors of
// all processes for who holds its socket, so less has to prove the same.
var loads = map[string]load{"ebpf": {100_000, 1000}, "iptables": {5000, 200}}

// returnToIdle bounds the wait for an agent to let go of what has ended.
const returnToIdle = 90 * time.Second

// After a hundred thousand short connections and a thousand half-closed ones
// both agents hold what they held before: descriptors, goroutines, connections,
// entries in the kernel's tables. The command runs as it is shipped, because
// the race detector would make this a test of patience.
func TestNothingLeaks(t *testing.T) {
	if testing.Short() {
		t.Skip("takes two minutes")
	}
	world.ForEach(t, lab.Options{Binary: world.Release(t)}, func(t *testing.T, w *world.World) {
		// The kernel's memory of a connection that has ended is its own, and lasts two minutes.
		for _, h := range []string{"a", "b"} {
			w.Run(h, "admin", "sh", "-c", "f=/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait; test ! -e $f || echo 1 >$f")
		}
		server, shop := w.Puppet("b", "server"), w.Puppet("a", "shop")
		// Many ports on the server's side, because a closed connection keeps its
		// four numbers for a minute, and a client has only 28,000 ports to a server's one.
		var echoes []string
		for i := range 8 {
			echoes = append(echoes, fmt.Sprintf("192.0.2.2:%d", 7001+i))
			server.Echo(echoes[i])
		}
		server.Hold("192.0.2.2:7100")
		// The first connections make what stays: tunnels, certificates, pools.
		burst(t, w, shop, echoes, 1000)
		halfClose(t, w, shop, server, 50)
		before := map[string]admin.Resources{}
		for _, h := range []string{"a", "b"} {
			before[h] = idle(t, w, h)
		}
		start := time.Now()
		n := loads[w.Capture]
		burst(t, w, shop, echoes, n.short)
		t.Logf("%d connections in %v", n.short, time.Since(start).Round(time.Millisecond))
		halfClose(t, w, shop, server, n.half)
		for _, h := range []string{"a", "b"} {
			backTo(t, w, h, before)
		}
	})
}

func burst(t *testing.T, w *world.World, p *world.Puppet, addrs []string, n int) {
	t.Helper()
	worked, err := p.Burst(addrs, n, 64)
	if err == nil && worked == n {
		return
	}
	t.Errorf("%d of %d connections worked: %v", worked, n, err)
	for _, h := range []string{"a", "b"} {
		t.Logf("host %s counts %v and has refused\n%s", h, w.Status(h).Counters, w.Ringfence(h, "decisions", "-n", "10", "--effect", "deny").Out)
	}
	t.FailNow()
}

// halfClose makes connections that the client has ended and the server keeps,
// sees that both agents carry them all, and lets the server end them.
func halfClose(t *testing.T, w *world.World, client, server *world.Puppet, n int) {
	t.Helper()
	client.HalfClose([]string{"192.0.2.2:7100"}, n)
	nettest.WaitFor(t, returnToIdle, "the server to see every end", func() bool { return server.Held() == n })
	for _, h := range []string{"a", "b"} {
		nettest.Wait(t, "host "+h+" to carry the half-closed connections", func() bool { return w.Status(h).Resources.Connections == n })
	}
	server.Drop()
	client.Drop()
}

// idle waits until an agent carries nothing, and returns what it holds then.
func idle(t *testing.T, w *world.World, host string) (r admin.Resources) {
	t.Helper()
	nettest.WaitFor(t, returnToIdle, "host "+host+" to be idle", func() bool {
		w.Ringfence(host, "status", "--collect")
		r = w.Status(host).Resources
		return r.Connections == 0 && r.Streams == 0
	})
	return r
}

// backTo waits until an agent holds no more than it did. Tunnels may be more,
// since a busy moment opens another one to the same place; each is a descriptor
// and a goroutine at either end, and only the dialling host counts it.
func backTo(t *testing.T, w *world.World, host string, before map[string]admin.Resources) {
	t.Helper()
	was := before[host]
	deadline := time.NewTimer(returnToIdle)
	defer deadline.Stop()
	for {
		tunnels := max(0, w.Status("a").Resources.Tunnels-before["a"].Tunnels)
		now := idle(t, w, host)
		held := excess(now, was, tunnels)
		if held == "" {
			t.Logf("host %s: %d descriptors, %d goroutines, %d more tunnels, %d KiB resident (was %d)", host, now.Descriptors, now.Goroutines,
				tunnels, now.RSSBytes>>10, was.RSSBytes>>10)
			return
		}
		select {
		case <-deadline.C:
			t.Errorf("host %s does not return to what it held%s\nbefore %+v\nnow    %+v", host, held, was, now)
			return
		default:
		}
	}
}

// excess says what there is more of than there was.
func excess(now, was admin.Resources, tunnels int) (text string) {
	if n := now.Descriptors - tunnels; n > was.Descriptors {
		text += fmt.Sprintf("; %d descriptors, were %d", n, was.Descriptors)
	}
	if n := now.Goroutines - tunnels; n > was.Goroutines {
		text += fmt.Sprintf("; %d goroutines, were %d", n, was.Goroutines)
	}
	for i, table := range now.Tables {
		n := table.Entries
		if strings.HasPrefix(table.Name, "observed_sockets/") || strings.HasPrefix(table.Name, "conntrack/") {
			n -= tunnels // which are sockets like others
		}
		// Routes are the kernel's own, which learns one now and then.
		if n > was.Tables[i].Entries && table.Name != "rf_routes" {
			text += fmt.Sprintf("; table %s has %d entries, had %d", table.Name, n, was.Tables[i].Entries)
		}
	}
	return text
}
