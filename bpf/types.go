package bpf

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"unsafe"
)

// The records shared with the kernel side; headers/ringfence.h says what each
// field means. Addresses are 16 bytes with IPv4 mapped, ports and addresses in
// network byte order: [Address], [FromAddress], [Port] and [FromPort] convert.
type (
	Scope       = captureScope
	Agent       = captureAgent
	ConnKey     = captureConnKey
	Note        = captureNote
	SockState   = captureSockState
	Exemption   = captureExemption
	PortKey     = capturePortKey
	PortOwner   = capturePort
	CgroupKey   = captureCgroupKey
	ListenerKey = captureListenerKey
	RouteKey    = captureRouteKey
	Route       = captureRoute
	DenyKey     = captureDenyKey
	Deny        = captureDeny
	Event       = captureEvent
)

// Mixed is the cgroup of a [PortOwner] when there is more than one.
const Mixed = ^uint64(0)

// Modes of a [Scope].
const (
	ModeWatch   uint32 = 0
	ModeDryRun  uint32 = 1
	ModeEnforce uint32 = 2
)

// Flags of a [Scope].
const (
	FlagHost          = uint32(captureRfScopeFlagRF_HOST)
	FlagLoopObserve   = uint32(captureRfScopeFlagRF_LOOP_OBSERVE)
	FlagLoopEnforce   = uint32(captureRfScopeFlagRF_LOOP_ENFORCE)
	FlagDownOpen      = uint32(captureRfScopeFlagRF_DOWN_OPEN)
	FlagRoutesUnknown = uint32(captureRfScopeFlagRF_ROUTES_UNKNOWN)
)

// Kinds of a [SockState].
const (
	SockCaptured = uint32(captureRfSockKindRF_SOCK_CAPTURED)
	SockServed   = uint32(captureRfSockKindRF_SOCK_SERVED)
	SockAgent    = uint32(captureRfSockKindRF_SOCK_AGENT)
)

// Kinds of a [Route].
const (
	RouteUnicast   = uint32(captureRfRouteKindRF_ROUTE_UNICAST)
	RouteLocal     = uint32(captureRfRouteKindRF_ROUTE_LOCAL)
	RouteBroadcast = uint32(captureRfRouteKindRF_ROUTE_BROADCAST)
	RouteError     = uint32(captureRfRouteKindRF_ROUTE_ERROR)
)

// Kinds of an [Event].
const (
	EventConnected = uint32(captureRfEventKindRF_EV_CONNECTED)
	EventAccepted  = uint32(captureRfEventKindRF_EV_ACCEPTED)
	EventListening = uint32(captureRfEventKindRF_EV_LISTENING)
	EventClosed    = uint32(captureRfEventKindRF_EV_CLOSED)
	EventRefused   = uint32(captureRfEventKindRF_EV_REFUSED)
	EventBypass    = uint32(captureRfEventKindRF_EV_BYPASS)
)

// Reason says why the kernel side did something. It indexes the counters.
type Reason uint32

// Reasons, in the order of enum rf_reason.
const (
	Captured       = Reason(captureRfReasonRF_CAPTURED)
	Watched        = Reason(captureRfReasonRF_WATCHED)
	Loopback       = Reason(captureRfReasonRF_LOOPBACK)
	OwnPort        = Reason(captureRfReasonRF_OWN_PORT)
	KernelSocket   = Reason(captureRfReasonRF_KERNEL_SOCKET)
	Excepted       = Reason(captureRfReasonRF_EXCEPTED)
	PrivilegedPort = Reason(captureRfReasonRF_PRIVILEGED_PORT)
	LinkLocal      = Reason(captureRfReasonRF_LINK_LOCAL)
	GroupAddress   = Reason(captureRfReasonRF_GROUP_ADDRESS)
	NoRoute        = Reason(captureRfReasonRF_NO_ROUTE)
	Device         = Reason(captureRfReasonRF_DEVICE)
	AgentDown      = Reason(captureRfReasonRF_AGENT_DOWN)
	Denied         = Reason(captureRfReasonRF_DENIED)
	NoMemory       = Reason(captureRfReasonRF_NO_MEMORY)
	NoNote         = Reason(captureRfReasonRF_NO_NOTE)
	Protocol       = Reason(captureRfReasonRF_PROTOCOL)
	PortReserved   = Reason(captureRfReasonRF_PORT_RESERVED)
	Steered        = Reason(captureRfReasonRF_STEERED)
	SteerRefused   = Reason(captureRfReasonRF_STEER_REFUSED)
	SteerPassed    = Reason(captureRfReasonRF_STEER_PASSED)
	Unsteered      = Reason(captureRfReasonRF_UNSTEERED)
	PortsFull      = Reason(captureRfReasonRF_PORTS_FULL)
	ExemptFull     = Reason(captureRfReasonRF_EXEMPT_FULL)
	EventLost      = Reason(captureRfReasonRF_EVENT_LOST)
	Marked         = Reason(captureRfReasonRF_MARKED)
	Multipath      = Reason(captureRfReasonRF_MULTIPATH)
	reasons        = Reason(captureRfReasonRF_REASONS)
)

var reasonNames = [reasons]string{
	"captured", "watched", "loopback", "own_port", "kernel_socket", "excepted", "privileged_port",
	"link_local", "group_address", "no_route", "device", "agent_down", "denied", "no_memory", "no_note",
	"protocol", "port_reserved", "steered", "steer_refused", "steer_passed", "unsteered", "ports_full",
	"exempt_full", "event_lost", "marked", "multipath",
}

func (r Reason) String() string {
	if r < reasons {
		return reasonNames[r]
	}
	return "unknown"
}

// Address converts to the kernel side's form; an invalid ip gives all zeros.
func Address(ip netip.Addr) (a [4]uint32) {
	if !ip.IsValid() {
		return a
	}
	b := ip.As16()
	for i := range a {
		a[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return a
}

// FromAddress converts from the kernel side's form. All zeros give the invalid
// address; IPv4 comes out unmapped.
func FromAddress(a [4]uint32) netip.Addr {
	if a == [4]uint32{} {
		return netip.Addr{}
	}
	var b [16]byte
	for i := range a {
		binary.NativeEndian.PutUint32(b[4*i:], a[i])
	}
	return netip.AddrFrom16(b).Unmap()
}

// Port converts a port to network byte order. The programs are built for
// little-endian machines only, so that is a swap.
func Port(p uint16) uint16 { return bits.ReverseBytes16(p) }

// FromPort converts a port from network byte order.
func FromPort(p uint16) uint16 { return bits.ReverseBytes16(p) }

// Connection makes the key of a connection that src dialled to dst.
func Connection(netns uint64, src, dst netip.AddrPort) ConnKey {
	return ConnKey{
		Netns: netns,
		Src:   Address(src.Addr()), Sport: Port(src.Port()),
		Dst: Address(dst.Addr()), Dport: Port(dst.Port()),
	}
}

// Prefix makes the key of a route.
func Prefix(netns uint64, p netip.Prefix) RouteKey {
	n := p.Bits()
	if p.Addr().Is4() {
		n += 96
	}
	return RouteKey{
		Prefixlen: 64 + uint32(n),
		NetnsHi:   uint32(netns >> 32), NetnsLo: uint32(netns),
		Dst: Address(p.Masked().Addr()),
	}
}

// EventSize is the length of an event's record.
const EventSize = int(unsafe.Sizeof(Event{}))

// ParseEvent reads one record of the event ring; false for one that is too short.
func ParseEvent(raw []byte) (e Event, ok bool) {
	if len(raw) < EventSize {
		return e, false
	}
	// Copied whole: the record has no pointers, and the ring's memory is aligned by the copy.
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&e)), EventSize), raw)
	return e, true
}

// CommOf is the thread name of an event.
func CommOf(e *Event) string {
	b := make([]byte, 0, len(e.Comm))
	for _, c := range e.Comm {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b)
}
