package socket

import (
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// withZone makes an address of its 16 octets: unmapped, and with the interface
// number as zone where that has a meaning.
func withZone(ip [16]byte, zone uint32) netip.Addr {
	addr := netip.AddrFrom16(ip).Unmap()
	if zone != 0 && addr.Is6() && addr.IsLinkLocalUnicast() {
		return addr.WithZone(strconv.FormatUint(uint64(zone), 10))
	}
	return addr
}

// rawAddr reads a kernel socket address in place.
func rawAddr(sa *unix.RawSockaddrAny) netip.AddrPort {
	switch sa.Addr.Family {
	case unix.AF_INET:
		in := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), ntohs(&in.Port))
	case unix.AF_INET6:
		in := (*unix.RawSockaddrInet6)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(withZone(in.Addr, in.Scope_id), ntohs(&in.Port))
	default:
		return netip.AddrPort{}
	}
}

// ntohs reads a port in network byte order, whatever the machine's.
func ntohs(port *uint16) uint16 {
	p := (*[2]byte)(unsafe.Pointer(port))
	return uint16(p[0])<<8 | uint16(p[1])
}

// sockaddr makes the kernel's form of to for a socket of the given family: an
// IPv6 socket dials an IPv4 address in its mapped form.
func sockaddr(family int, to netip.AddrPort) unix.Sockaddr {
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().Unmap().As4()}
	}
	sa := &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if zone, err := strconv.ParseUint(to.Addr().Zone(), 10, 32); err == nil {
		sa.ZoneId = uint32(zone)
	}
	return sa
}

// Family is the address family of a socket that dials ip: AF_INET or AF_INET6.
func Family(ip netip.Addr) int {
	if ip.Unmap().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
