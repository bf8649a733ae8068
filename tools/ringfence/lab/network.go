package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"ringfence.dev/cni/netns"
)

// netnsDir is where iproute2 keeps named namespaces, so that "ip netns" sees ours.
const netnsDir = "/run/netns"

// usable bounds the wait for the cable to carry and its addresses to be valid.
const usable = 5 * time.Second

// buildNetwork makes both namespaces, the cable between them, and addresses.
func (l *Lab) buildNetwork(ctx context.Context) error {
	if err := l.shareNetNSDir(); err != nil {
		return err
	}
	var ns []*netns.Handle
	for _, h := range hosts {
		if err := createNamed(l.NetNS(h.name)); err != nil {
			return err
		}
		handle, err := netns.Open(l.NetNS(h.name))
		if err != nil {
			return err
		}
		defer handle.Close()
		ns = append(ns, handle)
	}
	if err := connect(ns[0], ns[1]); err != nil {
		return err
	}
	for i, h := range hosts {
		if err := configure(ctx, ns[i], h); err != nil {
			return fmt.Errorf("host %s: %w", h.name, err)
		}
	}
	return nil
}

// shareNetNSDir makes /run/netns a shared mount, which lets a namespace that is
// removed here vanish from the mount namespaces of "ip netns exec" too.
func (l *Lab) shareNetNSDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	err := unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EINVAL) { // EINVAL: not a mount point yet
		return fmt.Errorf("share %s: %w", netnsDir, err)
	}
	if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s on itself: %w", netnsDir, err)
	}
	l.state.MountedNetNS = true
	if err := l.save(); err != nil {
		return err
	}
	if err := unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("share %s: %w", netnsDir, err)
	}
	return nil
}

// createNamed makes a network namespace and keeps it alive by a mount at path,
// the way iproute2 does. A name that is taken is an error.
func createNamed(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("network namespace %s exists already", path)
	}
	if err != nil {
		return err
	}
	f.Close()
	done := make(chan error, 1)
	go func() { done <- mountNew(path) }()
	if err := <-done; err != nil {
		os.Remove(path)
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	return nil
}

// mountNew makes a namespace on this goroutine's thread and mounts it at path.
func mountNew(path string) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("make: %w", err)
	}
	err = unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, "")
	// It is not enough to let the thread end: the main thread cannot end, and
	// the whole process would pass for one that runs in the new namespace.
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("return home: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

// connect lays a cable between two namespaces. Both ends are made inside, so
// that no interface ever shows on the machine itself.
func connect(a, b *netns.Handle) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = Device
	attrs.Namespace = netlink.NsFd(a.FD())
	cable := &netlink.Veth{LinkAttrs: attrs, PeerName: Device, PeerNamespace: netlink.NsFd(b.FD())}
	if err := netlink.LinkAdd(cable); err != nil {
		return fmt.Errorf("virtual cable: %w", err)
	}
	return nil
}

// configure raises a host's interfaces, sets its addresses and waits until
// both can be used.
func configure(ctx context.Context, ns *netns.Handle, h host) error {
	nl, err := netlink.NewHandleAt(vnetns.NsHandle(ns.FD()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	for _, dev := range []string{"lo", Device} {
		link, err := nl.LinkByName(dev)
		if err != nil {
			return fmt.Errorf("interface %s: %w", dev, err)
		}
		if dev == Device {
			if err := address(nl, link, h); err != nil {
				return err
			}
		}
		if err := nl.LinkSetUp(link); err != nil {
			return fmt.Errorf("raise %s: %w", dev, err)
		}
	}
	return waitUsable(ctx, nl, h)
}

func address(nl *netlink.Handle, link netlink.Link, h host) error {
	for _, p := range []netip.Prefix{h.v4, h.v6} {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			// Nobody else is on the cable: skip the second that duplicate detection takes (RFC 4862 section 5.4).
			a.Flags = unix.IFA_F_NODAD
		}
		err := nl.AddrAdd(link, a)
		if p.Addr().Is6() && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES)) {
			continue // a kernel booted without IPv6: the lab is IPv4 only
		}
		if err != nil {
			return fmt.Errorf("address %s: %w", p, err)
		}
	}
	return nil
}

// waitUsable returns when the cable carries and no address is tentative.
func waitUsable(ctx context.Context, nl *netlink.Handle, h host) error {
	ctx, cancel := context.WithTimeout(ctx, usable)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := carries(nl); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s on %s is not usable: %w", h.v4, Device, ctx.Err())
		case <-tick.C:
		}
	}
}

func carries(nl *netlink.Handle) (bool, error) {
	link, err := nl.LinkByName(Device)
	if err != nil {
		return false, err
	}
	// The other end may not be up yet: then there is no carrier, which is right
	// for the first host to be configured. Addresses are what must be settled.
	addrs, err := nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return false, err
	}
	for _, a := range addrs {
		if a.Flags&unix.IFA_F_TENTATIVE != 0 && !a.IP.IsLinkLocalUnicast() {
			return false, nil
		}
	}
	return link.Attrs().Flags&net.FlagUp != 0, nil
}

// removeNetwork undoes buildNetwork, as much of it as there is.
func (l *Lab) removeNetwork() error {
	var errs []error
	for _, h := range hosts {
		errs = append(errs, removeNamed(l.NetNS(h.name)))
	}
	if l.state.MountedNetNS {
		errs = append(errs, unshareNetNSDir())
	}
	return errors.Join(errs...)
}

// removeNamed cuts the cable and lets go of a named namespace.
func removeNamed(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// A namespace that something still holds open would keep its end of the
	// cable, so the cable is cut rather than left to die with the namespace.
	if ns, err := netns.Open(path); err == nil {
		cut(ns)
		ns.Close()
	}
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return os.Remove(path)
}

func cut(ns *netns.Handle) {
	nl, err := netlink.NewHandleAt(vnetns.NsHandle(ns.FD()), unix.NETLINK_ROUTE)
	if err != nil {
		return
	}
	defer nl.Close()
	if link, err := nl.LinkByName(Device); err == nil {
		_ = nl.LinkDel(link) // its peer goes with it; gone already is as good
	}
}

// unshareNetNSDir removes the mount that shareNetNSDir made, once nobody's
// namespace is left under it. A mount in use refuses, which is right.
func unshareNetNSDir() error {
	left, err := os.ReadDir(netnsDir)
	if err != nil || len(left) > 0 {
		return nil
	}
	if err := unix.Unmount(netnsDir, 0); err != nil {
		return nil
	}
	_ = os.Remove(netnsDir)
	return nil
}
