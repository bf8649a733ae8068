package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Message types, attributes and sizes of include/uapi/linux/{netlink,sock_diag,inet_diag}.h.
const (
	typeDump     = 18 // TCPDIAG_GETSOCK
	typeByFamily = 20 // SOCK_DIAG_BY_FAMILY
	typeDestroy  = 21 // SOCK_DESTROY

	headerSize  = 16 // struct nlmsghdr
	exactSize   = 56 // struct inet_diag_req_v2
	dumpSize    = 60 // struct inet_diag_req
	messageSize = 72 // struct inet_diag_msg

	attrBytecode = 1  // INET_DIAG_REQ_BYTECODE
	attrV6Only   = 11 // INET_DIAG_SKV6ONLY, Linux 4.6, listening sockets only
	attrCgroupID = 21 // INET_DIAG_CGROUP_ID, Linux 5.9

	opSrcGE = 2 // INET_DIAG_BC_S_GE
	opSrcLE = 3 // INET_DIAG_BC_S_LE

	noCookie = ^uint64(0) // INET_DIAG_NOCOOKIE in both halves
)

// States of a TCP socket, include/net/tcp_states.h.
const (
	Established = 1
	SynSent     = 2
	SynRecv     = 3
	CloseWait   = 8
	Listen      = 10
)

var errMalformed = errors.New("sockdiag: malformed answer")

// Socket is one TCP socket as the kernel describes it. IPv4 addresses are
// never in their v4-mapped form, also when the socket is an IPv6 one.
type Socket struct {
	Family              uint8 // unix.AF_INET or unix.AF_INET6
	State               uint8
	Source, Destination netip.AddrPort // Destination is unspecified when listening
	// Device is the index of the interface the socket is bound to, zero for none.
	Device uint32
	// V6Only means that a listening IPv6 socket takes no IPv4 connections.
	V6Only bool
	UID    uint32 // the socket's owner, in our user namespace
	Inode  uint64 // on sockfs; zero when no process has it (any more)
	Cookie uint64 // unique per boot
	// CgroupID is the cgroup v2 in which the socket was made. Zero when the
	// kernel does not tell.
	CgroupID uint64
}

// request is one question, before encoding.
type request struct {
	typ, flags uint16
	family     uint8
	states     uint32
	// A single socket's identity; not part of dumps.
	source, destination netip.AddrPort
	device              uint32
	cookie              uint64
	// port, when not zero, limits a dump to this source port.
	port uint16
}

// encode writes the request as one netlink message.
//
// Dumps use the older of the two request forms, the one without a family: it
// passes over the kernel's hash table, shared by all namespaces and with up to
// 64 Ki buckets, once instead of once per family.
func (r request) encode(seq uint32) []byte {
	le := binary.NativeEndian
	b := make([]byte, headerSize, 128)
	if r.typ == typeDump {
		b = append(b, make([]byte, dumpSize)...)
		le.PutUint32(b[headerSize+52:], r.states)
	} else {
		b = append(b, make([]byte, exactSize)...)
		b[headerSize], b[headerSize+1] = r.family, unix.IPPROTO_TCP
		le.PutUint32(b[headerSize+4:], r.states)
		r.putID(b[headerSize+8:])
	}
	if r.port != 0 {
		b = append(b, portFilter(r.port)...)
	}
	le.PutUint32(b[0:], uint32(len(b)))
	le.PutUint16(b[4:], r.typ)
	le.PutUint16(b[6:], r.flags|unix.NLM_F_REQUEST)
	le.PutUint32(b[8:], seq)
	return b
}

// putID writes struct inet_diag_sockid.
func (r request) putID(b []byte) {
	le := binary.NativeEndian
	binary.BigEndian.PutUint16(b[0:], r.source.Port())
	binary.BigEndian.PutUint16(b[2:], r.destination.Port())
	putAddr(b[4:20], r.source.Addr())
	putAddr(b[20:36], r.destination.Addr())
	le.PutUint32(b[36:], r.device)
	le.PutUint32(b[40:], uint32(r.cookie))
	le.PutUint32(b[44:], uint32(r.cookie>>32))
}

// portFilter is a program for the kernel that passes sockets whose source port
// is exactly port: two comparisons, each an op {code, yes, no} followed by its
// operand. Jumping past the end, by 4 more than is left, rejects. S_EQ would be
// shorter but is newer than the kernels we run on.
func portFilter(port uint16) []byte {
	le := binary.NativeEndian
	b := make([]byte, 4+16)
	le.PutUint16(b[0:], uint16(len(b)))
	le.PutUint16(b[2:], attrBytecode)
	for i, code := range []byte{opSrcGE, opSrcLE} {
		op := b[4+8*i:]
		op[0], op[1] = code, 8
		le.PutUint16(op[2:], uint16(16-8*i+4))
		le.PutUint16(op[6:], port)
	}
	return b
}

func putAddr(b []byte, a netip.Addr) {
	if a.Is4() {
		v4 := a.As4()
		copy(b, v4[:])
	} else if a.Is6() {
		v6 := a.As16()
		copy(b, v6[:])
	}
}

// messages splits what one receive returned and hands each answer to fn. It
// reports whether the series is over. seq is the request's number; others are
// leftovers of an earlier one. An error of one answer does not stop the walk: the
// end of the series, which may be in the same buffer, must not be missed.
func messages(b []byte, seq uint32, fn func(payload []byte) error) (done bool, failure error) {
	le := binary.NativeEndian
	for len(b) > 0 {
		if len(b) < headerSize {
			return done, fmt.Errorf("%w: %d bytes left", errMalformed, len(b))
		}
		size := int(le.Uint32(b))
		if size < headerSize || size > len(b) {
			return done, fmt.Errorf("%w: message of %d bytes in %d", errMalformed, size, len(b))
		}
		typ, flags := le.Uint16(b[4:]), le.Uint16(b[6:])
		if le.Uint32(b[8:]) == seq && !done {
			var err error
			done, err = message(typ, flags, b[headerSize:size], fn)
			if failure == nil {
				failure = err
			}
		}
		b = b[min(align(size), len(b)):]
	}
	return done, failure
}

func message(typ, flags uint16, payload []byte, fn func([]byte) error) (done bool, err error) {
	switch typ {
	case unix.NLMSG_NOOP:
		return false, nil
	case unix.NLMSG_ERROR:
		if len(payload) < 4 {
			return true, fmt.Errorf("%w: short error", errMalformed)
		}
		return true, errno(payload)
	case unix.NLMSG_DONE:
		done = true
		if len(payload) >= 4 { // the dump's own result
			err = errno(payload)
		}
	case typeByFamily, typeDump:
		done, err = flags&unix.NLM_F_MULTI == 0, fn(payload)
	default:
		err = fmt.Errorf("%w: message type %d", errMalformed, typ)
	}
	if err == nil && flags&unix.NLM_F_DUMP_INTR != 0 {
		err = errInterrupted
	}
	return done, err
}

func errno(payload []byte) error {
	if code := int32(binary.NativeEndian.Uint32(payload)); code < 0 {
		return unix.Errno(-code)
	}
	return nil
}

func align(n int) int { return (n + 3) &^ 3 }

// parseSocket decodes one inet_diag_msg with its attributes.
func parseSocket(b []byte) (Socket, error) {
	if len(b) < messageSize {
		return Socket{}, fmt.Errorf("%w: socket of %d bytes", errMalformed, len(b))
	}
	le := binary.NativeEndian
	s := Socket{
		Family: b[0], State: b[1],
		Device: le.Uint32(b[40:]),
		Cookie: uint64(le.Uint32(b[44:])) | uint64(le.Uint32(b[48:]))<<32,
		UID:    le.Uint32(b[64:]),
		Inode:  uint64(le.Uint32(b[68:])),
	}
	src, err := addr(s.Family, b[8:24])
	if err != nil {
		return Socket{}, err
	}
	dst, err := addr(s.Family, b[24:40])
	if err != nil {
		return Socket{}, err
	}
	s.Source = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b[4:]))
	s.Destination = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[6:]))
	return s, s.attributes(b[messageSize:])
}

func addr(family uint8, b []byte) (netip.Addr, error) {
	switch family {
	case unix.AF_INET:
		return netip.AddrFrom4([4]byte(b)), nil
	case unix.AF_INET6:
		return netip.AddrFrom16([16]byte(b)).Unmap(), nil
	}
	return netip.Addr{}, fmt.Errorf("%w: address family %d", errMalformed, family)
}

// attributes walks the rtattr list behind a message.
func (s *Socket) attributes(b []byte) error {
	le := binary.NativeEndian
	for len(b) >= 4 {
		size, typ := int(le.Uint16(b)), le.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)
		if size < 4 || size > len(b) {
			return fmt.Errorf("%w: attribute of %d bytes in %d", errMalformed, size, len(b))
		}
		value := b[4:size]
		switch {
		case typ == attrV6Only && len(value) >= 1:
			s.V6Only = value[0] != 0
		case typ == attrCgroupID && len(value) == 8:
			s.CgroupID = le.Uint64(value)
		}
		b = b[min(align(size), len(b)):]
	}
	return nil
}
