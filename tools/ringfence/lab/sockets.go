package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"ringfence.dev/cni/netns"
)

// SocketState is a TCP state as the kernel prints it (include/net/tcp_states.h).
type SocketState string

const (
	Established SocketState = "01"
	Listening   SocketState = "0A"
)

// listenWithin bounds the wait for a server to open its port.
const listenWithin = 15 * time.Second

// Sockets counts a host's TCP sockets in a state that have port at either end.
// The host may be [Here]: the machine itself.
func (l *Lab) Sockets(host string, port uint16, state SocketState) (n int, err error) {
	ns, err := l.namespace(host)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	err = ns.Do(func() error {
		for _, table := range []string{"tcp", "tcp6"} {
			data, err := os.ReadFile("/proc/thread-self/net/" + table)
			if err != nil && !errors.Is(err, os.ErrNotExist) { // no tcp6 on a kernel without IPv6
				return err
			}
			n += countSockets(string(data), port, state)
		}
		return nil
	})
	return n, err
}

func (l *Lab) namespace(host string) (*netns.Handle, error) {
	if host == Here {
		return netns.Self()
	}
	return netns.Open(l.NetNS(host))
}

func countSockets(table string, port uint16, state SocketState) (n int) {
	suffix := fmt.Sprintf(":%04X", port)
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) > 3 && f[3] == string(state) && (strings.HasSuffix(f[1], suffix) || strings.HasSuffix(f[2], suffix)) {
			n++
		}
	}
	return n
}

// WaitListening waits until a port is open on a host. It reads the socket
// tables rather than dialling, which would be one more connection to somebody.
func (l *Lab) WaitListening(ctx context.Context, host string, port uint16) error {
	ctx, cancel := context.WithTimeout(ctx, listenWithin)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		n, err := l.Sockets(host, port, Listening)
		if err != nil || n > 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("nothing listens on port %d of host %s: %w", port, host, ctx.Err())
		case <-tick.C:
		}
	}
}
