package ebpf

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ringfence.dev/bpf"
)

// Route messages of all scopes are awaited by one goroutine with epoll: a
// goroutine with a buffer per namespace would cost most of a workload's memory budget.

// followRoutes subscribes to the namespace's route messages, then reads the
// routes, in this order so that no change falls between.
func (b *Backend) followRoutes(s *scope) error {
	fd, err := s.def.NS.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	s.follow = fd
	const groups = 1<<(unix.RTNLGRP_LINK-1) |
		1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1) |
		1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1) |
		1<<(unix.RTNLGRP_IPV4_RULE-1) | 1<<(unix.RTNLGRP_IPV6_RULE-1)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return fmt.Errorf("subscribe to route messages: %w", err)
	}
	if err := b.syncRoutes(s); err != nil {
		return err
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	if err := unix.EpollCtl(b.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("await route messages: %w", err)
	}
	return nil
}

// closeFollower ends the subscription. The caller holds Backend.mu.
func (s *scope) closeFollower(epoll int) {
	if s.follow < 0 {
		return
	}
	_ = unix.EpollCtl(epoll, unix.EPOLL_CTL_DEL, s.follow, nil)
	unix.Close(s.follow)
	s.follow = -1
}

// runRoutes keeps the route table in line until ctx ends.
func (b *Backend) runRoutes(ctx context.Context) error {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	defer unix.Close(wake)
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wake)}
	if err := unix.EpollCtl(b.epoll, unix.EPOLL_CTL_ADD, wake, &ev); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	defer unix.EpollCtl(b.epoll, unix.EPOLL_CTL_DEL, wake, nil)
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		one := [8]byte{0: 1}
		_, _ = unix.Write(wake, one[:])
	})
	defer func() {
		if !stop() {
			<-woken // it must not write to a descriptor that is somebody else's by then
		}
	}()
	var events [64]unix.EpollEvent
	buf := make([]byte, 16<<10)
	for ctx.Err() == nil {
		n, err := unix.EpollWait(b.epoll, events[:], -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("epoll_wait", err)
		}
		for _, ev := range events[:max(n, 0)] {
			if int(ev.Fd) != wake {
				b.routesChanged(int(ev.Fd), buf)
			}
		}
	}
	return nil
}

// routesChanged drains one subscription, whose messages only say that it is time to look, and looks.
func (b *Backend) routesChanged(fd int, buf []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.following(fd)
	if s == nil {
		return // removed meanwhile
	}
	for {
		_, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR) {
			continue // messages were lost: one more reason to look
		}
		if err != nil {
			break
		}
	}
	before := s.unknown
	if err := b.syncRoutes(s); err != nil {
		b.log.Error("routes not followed", "scope", s.name, "error", err)
		return
	}
	if s.unknown == before {
		return
	}
	r := s.record
	r.Flags &^= bpf.FlagRoutesUnknown
	if s.unknown {
		r.Flags |= bpf.FlagRoutesUnknown
	}
	if err := b.inst.Maps.RfScopes.Put(s.cookie, &r); err != nil {
		b.log.Error("scope record not written", "scope", s.name, "error", err)
		return
	}
	s.record = r
}

func (b *Backend) following(fd int) *scope {
	b.index.RLock()
	defer b.index.RUnlock()
	for _, s := range b.byName {
		if s.follow == fd {
			return s
		}
	}
	return nil
}
