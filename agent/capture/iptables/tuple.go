package iptables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/cni/netns"
)

// ctnetlink, include/uapi/linux/netfilter/nfnetlink_conntrack.h: the numbers that
// a question for one connection needs.
const (
	ctGet        = 1<<8 | 1 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
	ctTupleOrig  = 1
	ctTupleReply = 2
	ctTupleIP    = 1
	ctTupleProto = 2
	ctIPv4Src    = 1
	ctIPv4Dst    = 2
	ctIPv6Src    = 3
	ctIPv6Dst    = 4
	ctProtoNum   = 1
	ctProtoSrc   = 2
	ctProtoDst   = 3
	nested       = 1 << 15 // NLA_F_NESTED
	attrTypeMask = 0x3fff

	nfgenLen = 4
)

var errTuple = errors.New("conntrack: unexpected answer")

// originalTuple asks conntrack how a connection, which the listener sees as from
// remote to local, looked when it was dialled.
func originalTuple(ns *netns.Handle, remote, local netip.AddrPort) (source, dest netip.AddrPort, err error) {
	fd, err := ns.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER)
	if err != nil {
		return source, dest, err
	}
	defer unix.Close(fd)
	limit := unix.NsecToTimeval(int64(time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return source, dest, err
	}
	if err := unix.Sendto(fd, tupleRequest(local, remote), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return source, dest, fmt.Errorf("ask conntrack: %w", err)
	}
	buf := make([]byte, 8<<10)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return source, dest, fmt.Errorf("ask conntrack: %w", err)
	}
	return parseTuple(buf[:n])
}

// tupleRequest asks by the reply direction: from the listener back to the caller.
func tupleRequest(from, to netip.AddrPort) []byte {
	src, dst, family := uint16(ctIPv4Src), uint16(ctIPv4Dst), byte(unix.AF_INET)
	if from.Addr().Is6() {
		src, dst, family = ctIPv6Src, ctIPv6Dst, unix.AF_INET6
	}
	ip := append(attr(src, from.Addr().AsSlice()), attr(dst, to.Addr().AsSlice())...)
	proto := attr(ctProtoNum, []byte{unix.IPPROTO_TCP})
	proto = append(proto, attr(ctProtoSrc, binary.BigEndian.AppendUint16(nil, from.Port()))...)
	proto = append(proto, attr(ctProtoDst, binary.BigEndian.AppendUint16(nil, to.Port()))...)
	tuple := attr(ctTupleReply|nested, append(attr(ctTupleIP|nested, ip), attr(ctTupleProto|nested, proto)...))

	msg := make([]byte, unix.SizeofNlMsghdr+nfgenLen, unix.SizeofNlMsghdr+nfgenLen+len(tuple))
	msg = append(msg, tuple...)
	binary.NativeEndian.PutUint32(msg, uint32(len(msg)))
	binary.NativeEndian.PutUint16(msg[4:], ctGet)
	binary.NativeEndian.PutUint16(msg[6:], unix.NLM_F_REQUEST)
	msg[unix.SizeofNlMsghdr] = family
	return msg
}

func attr(kind uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofNlAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func parseTuple(b []byte) (source, dest netip.AddrPort, err error) {
	if len(b) < unix.SizeofNlMsghdr+nfgenLen {
		return source, dest, errTuple
	}
	if binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR {
		return source, dest, fmt.Errorf("ask conntrack: %w", unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))))
	}
	tuple := find(b[unix.SizeofNlMsghdr+nfgenLen:], ctTupleOrig)
	ip, proto := find(tuple, ctTupleIP), find(tuple, ctTupleProto)
	src, ok1 := netip.AddrFromSlice(either(ip, ctIPv4Src, ctIPv6Src))
	dst, ok2 := netip.AddrFromSlice(either(ip, ctIPv4Dst, ctIPv6Dst))
	sport, dport := find(proto, ctProtoSrc), find(proto, ctProtoDst)
	if !ok1 || !ok2 || len(sport) != 2 || len(dport) != 2 {
		return source, dest, errTuple
	}
	return netip.AddrPortFrom(src.Unmap(), binary.BigEndian.Uint16(sport)), netip.AddrPortFrom(dst.Unmap(), binary.BigEndian.Uint16(dport)), nil
}

func either(b []byte, a, c uint16) []byte {
	if v := find(b, a); v != nil {
		return v
	}
	return find(b, c)
}

// find returns the value of the first attribute of a kind, or nil.
func find(b []byte, kind uint16) []byte {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return nil
		}
		if binary.NativeEndian.Uint16(b[2:])&attrTypeMask == kind {
			return b[unix.SizeofNlAttr:size]
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return nil
}
