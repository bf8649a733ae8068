package bpf

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// What is on the path of every connection goes to the kernel directly: the
// library's general way looks at types by reflection and allocates, which costs
// more than the system call itself.

var (
	// ErrNoEntry reports a key that is not in a table.
	ErrNoEntry = errors.New("bpf: no such entry")
	// ErrClosed reports use of an Instance after Close.
	ErrClosed = errors.New("bpf: instance is closed")
)

// elemAttr is the part of union bpf_attr (include/uapi/linux/bpf.h) for commands on map elements.
type elemAttr struct {
	fd    uint32
	_     uint32
	key   uint64
	value uint64
	flags uint64
}

// request is one command with its key and value. The kernel gets addresses as
// integers, and a goroutine's stack may move: requests are on the heap, which does not.
type request struct {
	attr  elemAttr
	conn  ConnKey
	note  Note
	fd    uint32
	state SockState
	image captureImageKey
	id    uint64
}

var requests = sync.Pool{New: func() any { return new(request) }}

// do issues a command on one of i's tables. key and value point into r.
func (r *request) do(i *Instance, cmd uintptr, m *ebpf.Map, key, value unsafe.Pointer) error {
	i.using.RLock()
	defer i.using.RUnlock()
	if i.closed {
		return ErrClosed
	}
	r.attr = elemAttr{fd: uint32(m.FD()), key: uint64(uintptr(key)), value: uint64(uintptr(value))}
	_, _, errno := unix.Syscall(unix.SYS_BPF, cmd, uintptr(unsafe.Pointer(&r.attr)), unsafe.Sizeof(r.attr))
	runtime.KeepAlive(r)
	runtime.KeepAlive(m)
	switch errno {
	case 0:
		return nil
	case unix.ENOENT:
		return ErrNoEntry
	default:
		return errno
	}
}

// TakeNote takes the note of an accepted connection out of the table, so that
// a second call finds none. It returns [ErrNoEntry] when there is none.
func (i *Instance) TakeNote(key ConnKey) (Note, error) {
	r := requests.Get().(*request)
	defer requests.Put(r)
	r.conn, r.note = key, Note{}
	err := r.do(i, unix.BPF_MAP_LOOKUP_AND_DELETE_ELEM, i.Maps.RfNotes, unsafe.Pointer(&r.conn), unsafe.Pointer(&r.note))
	return r.note, err
}

// MarkSocket files what the hooks shall know of a socket of the agent's own, by its descriptor.
func (i *Instance) MarkSocket(fd int, st SockState) error {
	r := requests.Get().(*request)
	defer requests.Put(r)
	r.fd, r.state = uint32(fd), st
	return r.do(i, unix.BPF_MAP_UPDATE_ELEM, i.Maps.RfSocks, unsafe.Pointer(&r.fd), unsafe.Pointer(&r.state))
}

// ExecID is the exec id of a thread group after its latest execve that was
// seen. It returns zero when none was: no execve since the agent started, or too many others since.
func (i *Instance) ExecID(tgid uint32, start uint64) (uint64, error) {
	r := requests.Get().(*request)
	defer requests.Put(r)
	r.image, r.id = captureImageKey{Tgid: tgid, Start: start}, 0
	err := r.do(i, unix.BPF_MAP_LOOKUP_ELEM, i.Maps.RfExecs, unsafe.Pointer(&r.image), unsafe.Pointer(&r.id))
	if err == ErrNoEntry {
		return 0, nil
	}
	return r.id, err
}

// watchExecs starts filling the table that ExecID reads. The links are not
// pinned: without an agent nobody asks. Before Linux 6.10 there is a moment
// during execve in which /proc shows the new executable and the table does not know yet.
func (i *Instance) watchExecs() error {
	if !i.Has(featureBTF) {
		return nil
	}
	for point, name := range map[string]string{"sched_process_exec": "rf_exec", "sched_prepare_exec": "rf_exec_soon"} {
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: point, Program: i.coll.Programs[name]})
		if err != nil && name == "rf_exec_soon" && errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("attach %s: %w", name, err)
		}
		i.execs = append(i.execs, l)
	}
	return nil
}

// mapListens maps the count of listener changes into this process.
func (i *Instance) mapListens() error {
	mem, err := unix.Mmap(i.Maps.RfListens.FD(), 0, 8, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map rf_listens: %w", err)
	}
	i.listens = mem
	return nil
}

// Listens is how often a listening socket has come or gone in a scope of this
// instance. It costs no system call. After Close it stays zero.
func (i *Instance) Listens() uint64 {
	i.using.RLock()
	defer i.using.RUnlock()
	if i.closed {
		return 0
	}
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&i.listens[0])))
}
