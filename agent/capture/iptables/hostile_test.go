package iptables

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

// With the agent dead, the kernel alone refuses, and whoever takes its ports, with
// whatever options and rights, is handed nothing.
func TestDeadAgentsPortsAreWorthNothing(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.add(authz.Enforce)
		serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
		serveBanner(t, h.peer, "[2001:db8::2]:8080", "peer")
		serveWorkload(t, h.ns, cg.work, "192.0.2.1:9090")
		h.die()
		h.want(cg.work, "refused", "192.0.2.2:8080")
		h.want(cg.work, "refused", "[2001:db8::2]:8080")
		for _, transparent := range []string{"", "transparent"} {
			var thieves []*daemon
			for _, at := range []string{"127.0.0.1:15001", "[::1]:15001", "127.0.0.1:15006", "0.0.0.0:15008"} {
				args := []string{}
				if transparent != "" {
					args = append(args, transparent)
				}
				thieves = append(thieves, serveWorkload(t, h.ns, cg.other, at, args...))
			}
			h.want(cg.work, "refused", "192.0.2.2:8080")
			h.want(cg.work, "refused", "[2001:db8::2]:8080")
			h.wantPeer("refused", "192.0.2.1:15008")
			// Without any listener that TPROXY may use, an inbound SYN is dropped.
			if got, _ := runAs(t, h.peer, cg.other, "dial", "192.0.2.1:9090"); got != "refused" && got != "timeout" {
				t.Errorf("inbound, thief %q: %q", transparent, got)
			}
			for _, thief := range thieves {
				thief.stop()
			}
		}
		// The next agent needs no new rules.
		h.live()
		h.want(cg.work, "outbound 192.0.2.2:8080", "192.0.2.2:8080")
	})
}

// On lo the receiving side tells the agent's connections by a mark. Whoever
// sets the same one outside of the agent's cgroup has it wiped.
func TestForgedMarkGainsNothing(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.scope.Loopback, h.scope.Host = capture.LoopbackEnforce, true
		h.add(authz.Enforce)
		if err := h.b.SetCgroups("test", []capture.Cgroup{{Path: cg.other, Covered: false}}); err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			h.t = t
			serveWorkload(t, h.ns, cg.work, f.at(f.loop, 9090))
			to := f.at(f.loop, 9090)
			if got := h.dialAsAgent(to); got != "workload "+to {
				t.Errorf("the agent's dial over lo: %q", got)
			}
			h.want(cg.work, "outbound "+to, to)
			h.want(cg.other, "inbound "+to, to) // not covered itself, but the server is
			h.want(cg.other, "inbound "+to, to, fmt.Sprintf("mark=%d", h.b.mark))
			h.want(cg.work, "outbound "+to, to, fmt.Sprintf("mark=%d", h.b.mark))
			h.want(cg.work, "no origin", f.at(f.loop, capture.OutboundPort))
		}
	})
}

// What conntrack calls INVALID is never shown to the nat table, so it would leave
// in clear.
func TestHandMadeSegmentsDoNotLeave(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		for _, f := range families {
			t.Run(f.name, func(t *testing.T) {
				h := newHost(t, v, nil)
				h.add(authz.DryRun)
				seen := sniff(t, h.peer)
				if got := h.sendRaw(f, "leaves-in-dry-run", seen); !got {
					t.Error("the segment never arrives: the test proves nothing")
				}
				h.setMode(authz.Enforce)
				if got := h.sendRaw(f, "enforced", seen); got {
					t.Error("a hand-made segment left an enforcing scope")
				}
			})
		}
	})
}

// sendRaw sends a SYN+FIN segment with text as data from a process outside of
// the agent's cgroup, then a datagram as end mark, and reports whether the segment was seen.
func (h *host) sendRaw(f family, text string, seen <-chan string) bool {
	h.t.Helper()
	if got, _ := runAs(h.t, h.ns, cg.work, "raw", f.us, f.it, text); got != "sent" {
		h.t.Fatalf("raw: %s", got)
	}
	deadline := time.After(dialLimit)
	for found := false; ; {
		select {
		case packet := <-seen:
			found = found || strings.Contains(packet, "segment:"+text)
			if strings.Contains(packet, "end:"+text) {
				return found
			}
		case <-deadline:
			h.t.Fatal("waited for the end mark")
		}
	}
}

// raw is a workload with CAP_NET_RAW.
func raw(from, to, text string) string {
	src, dst := netip.MustParseAddr(from), netip.MustParseAddr(to)
	domain := unix.AF_INET
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{192, 0, 2, 2}}
	if dst.Is6() {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Addr: dst.As16()}
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW, unix.IPPROTO_TCP)
	if err != nil {
		return err.Error()
	}
	err = unix.Sendto(fd, segment(src, dst, "segment:"+text), 0, sa)
	if err != nil && !errors.Is(err, unix.EPERM) { // EPERM: a rule dropped it
		return err.Error()
	}
	conn, err := net.Dial("udp", net.JoinHostPort(to, "9"))
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "end:"+text); err != nil {
		return err.Error()
	}
	return "sent"
}

// segment is a TCP segment with SYN and FIN, which no connection ever has.
func segment(src, dst netip.Addr, text string) []byte {
	b := make([]byte, 20, 20+len(text))
	b[0], b[1] = 0x9c, 0x40 // port 40000
	b[2], b[3] = 0x1f, 0x90 // port 8080
	b[12], b[13] = 5<<4, 0x03
	b[14] = 0xff
	b = append(b, text...)
	pseudo := append(slices.Clone(src.AsSlice()), dst.AsSlice()...)
	pseudo = append(pseudo, 0, 6, byte(len(b)>>8), byte(len(b)))
	sum := uint32(0)
	for _, part := range [][]byte{pseudo, b} {
		for i, c := range part {
			if i%2 == 0 {
				sum += uint32(c) << 8
			} else {
				sum += uint32(c)
			}
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	b[16], b[17] = ^byte(sum>>8), ^byte(sum)
	return b
}

// sniff delivers every packet that reaches a namespace until the test ends.
func sniff(t *testing.T, ns *nettest.NS) <-chan string {
	t.Helper()
	all := uint16(unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8)
	fd := -1
	if err := ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(all))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "packets")
	packets, done := make(chan string, 4096), make(chan struct{})
	t.Cleanup(func() {
		file.Close()
		<-done
	})
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for {
			n, err := file.Read(buf)
			if err != nil {
				return
			}
			select {
			case packets <- string(buf[:n]):
			default: // nobody reads any more
			}
		}
	}()
	return packets
}

// An ACK that answers a SYN cookie finds no half-open socket. It must reach the
// agent all the same, or a flood would open the way to the workload.
func TestSYNCookiesDoNotLeadPastTheAgent(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.add(authz.Enforce)
		h.ns.Exec(t, "sysctl", "-q", "-w", "net.ipv4.tcp_syncookies=2") // always
		for _, f := range families {
			serveWorkload(t, h.ns, cg.work, f.at("", 9000+int(f.f)))
			h.wantPeer("inbound "+f.at(f.us, 9000+int(f.f)), f.at(f.us, 9000+int(f.f)))
			serveBanner(t, h.peer, f.at(f.it, 8080), "peer")
			h.want(cg.work, "outbound "+f.at(f.it, 8080), f.at(f.it, 8080))
		}
	})
}

// Two connections with one source port are told apart by their destinations,
// which the redirect makes the same.
func TestSourcePortUsedTwice(t *testing.T) {
	h := newHost(t, "", nil)
	h.add(authz.Enforce)
	for _, f := range families {
		from := f.at(f.us, 40123)
		first, second := f.at(f.it, 8081), f.at(f.it, 8082)
		h.want(cg.work, "outbound "+first, first, "from="+from)
		h.want(cg.work, "outbound "+second, second, "from="+from)
		if got := h.last().Source.String(); got != from {
			t.Errorf("source of the second connection = %s, want %s", got, from)
		}
		if h.seenFrom() == from {
			t.Error("the kernel kept the source port: the test proves nothing")
		}
	}
}

// A connection that was open before goes on, in both directions.
func TestOpenConnectionsStay(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		l := h.peer.Listen(t, "192.0.2.2:8080")
		d, line := start(t, h.ns, command(t, cg.work, "hold", "192.0.2.2:8080"))
		if line != "connected" {
			t.Fatal(line)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		h.add(authz.DryRun)
		for _, step := range []string{"one\n", "two\n"} {
			if _, err := io.WriteString(d.in, step); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, len(step))
			_ = conn.SetReadDeadline(time.Now().Add(dialLimit))
			if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != step {
				t.Fatalf("%q, %v in %v", buf, err, h.scope.Mode)
			}
			if _, err := conn.Write(buf); err != nil {
				t.Fatal(err)
			}
			if got, err := d.out.ReadString('\n'); err != nil || got != step {
				t.Fatalf("back: %q, %v", got, err)
			}
			h.setMode(authz.Enforce)
		}
	})
}

func TestRunRepairsWhatSomebodyChanged(t *testing.T) {
	forEachVariant(t, func(t *testing.T, v fw.Variant) {
		h := newHost(t, v, nil)
		h.add(authz.Enforce)
		h.ns.Exec(t, "iptables-"+string(v), "-t", "nat", "-F")
		if wrong := h.b.Verify("test"); len(wrong) == 0 {
			t.Fatal("a flushed nat table is not noticed")
		}
		// Even now nothing leaves: the net below the redirect refuses.
		serveBanner(t, h.peer, "192.0.2.2:8080", "peer")
		h.want(cg.work, "refused", "192.0.2.2:8080")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- h.b.Run(ctx, func(capture.Event) {}) }()
		nettest.Wait(t, "the rules to be repaired", func() bool { return h.b.Repairs() > 0 })
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if wrong := h.b.Verify("test"); len(wrong) > 0 {
			t.Errorf("after repair: %q", wrong)
		}
		h.want(cg.work, "outbound 192.0.2.2:8080", "192.0.2.2:8080")
	})
}
