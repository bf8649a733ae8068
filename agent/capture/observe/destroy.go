package observe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/cni/netns"
)

// Multicast groups of NETLINK_SOCK_DIAG and the layout of struct inet_diag_msg,
// include/uapi/linux/sock_diag.h and inet_diag.h.
const (
	groupTCPDestroy  = 1
	groupTCP6Destroy = 3

	diagMsgLen     = 72
	diagCgroupID   = 21 // INET_DIAG_CGROUP_ID
	solNetlink     = 270
	addMembership  = 1 // NETLINK_ADD_MEMBERSHIP
	receiveBuffer  = 1 << 20
	messageMaximum = 32 << 10
)

var errShort = errors.New("observe: message of the kernel is too short")

// destroyEvents receives the kernel's notice of each TCP socket that ends in one
// namespace. It is the only trace of connections shorter than a sample.
type destroyEvents struct {
	file *os.File
	done chan struct{} // closed when the reader is gone
	lost *atomic.Uint64

	mu    sync.Mutex
	ended []sockdiag.Socket // at most queue; guarded by mu
}

// openDestroyEvents needs CAP_NET_ADMIN in the namespace.
func openDestroyEvents(ns *netns.Handle, lost *atomic.Uint64) (*destroyEvents, error) {
	fd, err := ns.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_NONBLOCK, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	// A socket without address of its own counts as the sender, the kernel itself,
	// and is left out of every broadcast.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind for ended sockets: %w", err)
	}
	for _, group := range []int{groupTCPDestroy, groupTCP6Destroy} {
		if err := unix.SetsockoptInt(fd, solNetlink, addMembership, group); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("subscribe to ended sockets: %w", err)
		}
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	d := &destroyEvents{file: os.NewFile(uintptr(fd), "sock_diag"), done: make(chan struct{}), lost: lost}
	go d.read()
	return d, nil
}

func (d *destroyEvents) read() {
	defer close(d.done)
	buf := make([]byte, messageMaximum)
	for {
		n, err := d.file.Read(buf)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			d.lost.Add(1) // at least one
		case err != nil:
			return
		default:
			d.parse(buf[:n])
		}
	}
}

func (d *destroyEvents) parse(b []byte) {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			d.lost.Add(1)
			return
		}
		if s, err := parseDiag(b[unix.SizeofNlMsghdr:size]); err == nil {
			d.keep(s)
		} else {
			d.lost.Add(1)
		}
		b = b[min(len(b), (size+3)&^3):]
	}
}

func (d *destroyEvents) keep(s sockdiag.Socket) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.ended) >= queue {
		d.lost.Add(1)
		return
	}
	d.ended = append(d.ended, s)
}

func (d *destroyEvents) take() []sockdiag.Socket {
	d.mu.Lock()
	defer d.mu.Unlock()
	ended := d.ended
	d.ended = nil
	return ended
}

func (d *destroyEvents) close() {
	d.file.Close()
	<-d.done
}

// parseDiag reads struct inet_diag_msg and the one attribute that names the
// socket's cgroup. The inode number is zero: the socket has left its file.
func parseDiag(b []byte) (s sockdiag.Socket, err error) {
	if len(b) < diagMsgLen {
		return s, errShort
	}
	s.Family, s.State = b[0], b[1]
	s.Source = diagAddr(s.Family, b[8:24], b[4:6])
	s.Destination = diagAddr(s.Family, b[24:40], b[6:8])
	s.Device = binary.NativeEndian.Uint32(b[40:])
	s.Cookie = uint64(binary.NativeEndian.Uint32(b[44:])) | uint64(binary.NativeEndian.Uint32(b[48:]))<<32
	s.UID = binary.NativeEndian.Uint32(b[64:])
	s.CgroupID = diagCgroup(b[diagMsgLen:])
	return s, nil
}

func diagAddr(family uint8, ip, port []byte) netip.AddrPort {
	addr := netip.AddrFrom16([16]byte(ip)).Unmap()
	if family == unix.AF_INET {
		addr = netip.AddrFrom4([4]byte(ip[:4]))
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(port))
}

func diagCgroup(b []byte) uint64 {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return 0
		}
		if binary.NativeEndian.Uint16(b[2:]) == diagCgroupID && size >= unix.SizeofNlAttr+8 {
			return binary.NativeEndian.Uint64(b[unix.SizeofNlAttr:])
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return 0
}
