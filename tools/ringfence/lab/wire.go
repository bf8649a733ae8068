package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/cni/netns"
)

// Wire records what passes over the cable at one host, both directions, from
// the moment it is opened. It sees what an eavesdropper would: frames, not sockets.
type Wire struct {
	socket *os.File
	done   chan struct{}

	// mu held means no frame is being added.
	mu      sync.Mutex
	payload []byte // guarded by mu: TCP payloads in order of arrival, at most maxRecorded
	ports   map[uint16]int
	tls     int // guarded by mu: segments that begin with a TLS record header
}

// maxRecorded bounds the payload that a Wire keeps. More is counted, not kept.
const maxRecorded = 8 << 20

// Record starts recording at a host.
func (l *Lab) Record(host string) (*Wire, error) {
	if err := isHost(host); err != nil {
		return nil, err
	}
	ns, err := netns.Open(l.NetNS(host))
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", host, err)
	}
	defer ns.Close()
	// SOCK_DGRAM leaves the link-layer header out: what is read begins with the IP header.
	fd, err := ns.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := bindToCable(fd, ns); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("record at host %s: %w", host, err)
	}
	w := &Wire{socket: os.NewFile(uintptr(fd), "wire"), done: make(chan struct{}), ports: map[uint16]int{}}
	go w.read()
	return w, nil
}

func bindToCable(fd int, ns *netns.Handle) error {
	var index int
	if err := ns.Do(func() (err error) {
		index, err = interfaceIndex(Device)
		return err
	}); err != nil {
		return err
	}
	// A burst must not be lost while the reader waits for a processor. Root may
	// go past the limit; where it may not, the default is kept.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, maxRecorded)
	return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: index})
}

func interfaceIndex(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	return int(ifr.Uint32()), nil
}

func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

func (w *Wire) read() {
	defer close(w.done)
	buf := make([]byte, 1<<17) // segments may be as large as offloading makes them
	for {
		n, err := w.socket.Read(buf)
		if errors.Is(err, unix.ENETDOWN) {
			continue // reported once when the interface goes
		}
		if err != nil {
			return
		}
		if port, payload, ok := tcpPayload(buf[:n]); ok {
			w.add(port, payload)
		}
	}
}

func (w *Wire) add(ports [2]uint16, payload []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range ports {
		w.ports[p] += len(payload)
	}
	if isTLSRecord(payload) {
		w.tls++
	}
	w.payload = append(w.payload, payload[:min(len(payload), maxRecorded-len(w.payload))]...)
}

// isTLSRecord reports whether a segment begins with the header of a TLS record:
// its type, and a version of 3.x (RFC 8446 section 5.1).
func isTLSRecord(p []byte) bool {
	return len(p) >= 5 && p[0] >= 20 && p[0] <= 23 && p[1] == 3 && p[2] <= 4
}

// tcpPayload finds the payload of a TCP segment in an IP packet, and its ports.
func tcpPayload(packet []byte) (ports [2]uint16, payload []byte, ok bool) {
	segment, ok := tcpSegment(packet)
	if !ok || len(segment) < 20 {
		return ports, nil, false
	}
	offset := int(segment[12]>>4) * 4
	if offset < 20 || offset > len(segment) {
		return ports, nil, false
	}
	ports = [2]uint16{binary.BigEndian.Uint16(segment), binary.BigEndian.Uint16(segment[2:])}
	return ports, segment[offset:], len(segment) > offset
}

func tcpSegment(p []byte) ([]byte, bool) {
	if len(p) < 20 {
		return nil, false
	}
	switch p[0] >> 4 {
	case 4:
		header, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
		if total == 0 { // larger than the field can say (kernels with big TCP)
			total = len(p)
		}
		if p[9] != unix.IPPROTO_TCP || header < 20 || total < header || total > len(p) {
			return nil, false
		}
		return p[header:total], true
	case 6:
		const header = 40
		if len(p) < header || p[6] != unix.IPPROTO_TCP {
			return nil, false // extension headers do not occur on this cable
		}
		return p[header:], true
	}
	return nil, false
}

// Saw reports whether text passed in clear. Text that two segments share is found too.
func (w *Wire) Saw(text string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Contains(w.payload, []byte(text))
}

// TLSRecords counts the segments that began with a TLS record.
func (w *Wire) TLSRecords() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tls
}

// Bytes counts the TCP payload that passed from or to a port.
func (w *Wire) Bytes(port uint16) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ports[port]
}

// Close stops recording. What was recorded can still be asked for.
func (w *Wire) Close() error {
	// What the kernel has queued by now belongs to the record.
	_ = w.socket.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	<-w.done
	return w.socket.Close()
}
