// Package outgoing prepares the agent's own sockets, whatever the back end. A dial on
// behalf of a workload leaves by the device and from the address that the
// workload's own connection would have had.
package outgoing

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"ringfence.dev/proxy/flow"
)

// BindLike gives a socket that is not connected yet the device and source
// address of the flow it carries on. Only outbound flows have any.
func BindLike(fd int, to netip.Addr, f flow.Flow) error {
	if f.Direction != flow.Outbound {
		return nil
	}
	if f.Device != 0 { // SO_BINDTOIFINDEX is Linux 5.0
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, int(f.Device)); err != nil {
			return fmt.Errorf("bind to the caller's device %d: %w", f.Device, err)
		}
	}
	src := f.BoundSource
	if !src.IsValid() || src.IsLoopback() || src.Is4() != to.Unmap().Is4() {
		return nil
	}
	// The port is chosen at connect, so many dials can share the address.
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return fmt.Errorf("set IP_BIND_ADDRESS_NO_PORT: %w", err)
	}
	var sa unix.Sockaddr
	if src.Is4() && to.Is4() {
		sa = &unix.SockaddrInet4{Addr: src.As4()}
	} else {
		sa = &unix.SockaddrInet6{Addr: src.As16()}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return fmt.Errorf("bind to the caller's source %s: %w", src, err)
	}
	return nil
}
