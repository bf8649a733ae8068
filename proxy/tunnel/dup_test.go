package tunnel_test

import "golang.org/x/sys/unix"

func dup(fd int) (int, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(n, true)
	}
	return n, err
}
