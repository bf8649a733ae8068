package netns

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Socket opens a socket in the namespace: close-on-exec, and non-blocking when
// typ carries SOCK_NONBLOCK. A socket belongs to its namespace for life, so it
// may be connected, bound and used from any thread afterwards.
func (h *Handle) Socket(domain, typ, proto int) (int, error) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.file == nil {
		return -1, ErrClosed
	}
	if h.own {
		fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, proto)
		return fd, os.NewSyscallError("socket", err)
	}
	reply := replies.Get().(chan result)
	defer replies.Put(reply)
	opener.once.Do(opener.start)
	opener.jobs <- job{ns: int(h.file.Fd()), domain: domain, typ: typ, proto: proto, reply: reply}
	r := <-reply
	if r.err != nil {
		return -1, fmt.Errorf("socket in network namespace %s: %w", h.path, r.err)
	}
	return r.fd, nil
}

// The opener is one thread, for the life of the process, that walks from
// namespace to namespace and opens sockets: three system calls each, where Do
// costs a goroutine, a thread and five. It holds no namespace open that its
// callers do not hold: after each socket it goes home.
type openerThread struct {
	once sync.Once
	jobs chan job
}

type job struct {
	ns, domain, typ, proto int
	reply                  chan result
}

type result struct {
	fd  int
	err error
}

var (
	opener  = openerThread{jobs: make(chan job)}
	replies = sync.Pool{New: func() any { return make(chan result, 1) }}
)

func (o *openerThread) start() {
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			home = nil
		}
		for j := range o.jobs {
			var r result
			if r.err = unix.Setns(j.ns, unix.CLONE_NEWNET); r.err == nil {
				r.fd, r.err = unix.Socket(j.domain, j.typ|unix.SOCK_CLOEXEC, j.proto)
				if home != nil {
					// So that a namespace whose last handle closes can be freed.
					_ = unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)
				}
			}
			j.reply <- r
		}
	}()
}
