package ebpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"ringfence.dev/bpf"
)

const tcpListen = 10 // TCP_LISTEN, include/net/tcp_states.h

// diagRequest is struct inet_diag_req_v2, linux/inet_diag.h: all listening TCP sockets of a family.
type diagRequest struct{ family uint8 }

func (diagRequest) Len() int { return 56 }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0], b[1] = r.family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 1<<tcpListen)
	return b
}

// Positions in struct inet_diag_msg and the attribute after it, linux/inet_diag.h.
const (
	diagSize     = 72
	diagCgroupID = 21 // INET_DIAG_CGROUP_ID, Linux 5.9
)

// listeningPorts reads the TCP ports that are listened on in the current
// thread's namespace, with the cgroup that their sockets were made in.
func listeningPorts() (map[uint16]bpf.PortOwner, error) {
	out := map[uint16]bpf.PortOwner{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		req.AddData(diagRequest{family})
		msgs, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
		if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EAFNOSUPPORT) {
			continue // no IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("list listening sockets: %w", err)
		}
		for _, m := range msgs {
			if len(m) >= diagSize && m[1] == tcpListen {
				port := binary.BigEndian.Uint16(m[4:]) // family, state, timer, retrans, then the id
				out[port] = withListener(out[port], diagCgroup(m[diagSize:]))
			}
		}
	}
	return out, nil
}

// withListener adds one socket to what is known of a port.
func withListener(p bpf.PortOwner, cgroup uint64) bpf.PortOwner {
	if p.Listeners > 0 && p.Cgroup != cgroup {
		cgroup = bpf.Mixed
	}
	return bpf.PortOwner{Listeners: p.Listeners + 1, Cgroup: cgroup}
}

// diagCgroup finds the socket's cgroup among the attributes; zero when the kernel does not tell.
func diagCgroup(attributes []byte) uint64 {
	list, err := nl.ParseRouteAttr(attributes)
	if err != nil {
		return 0
	}
	for _, a := range list {
		if a.Attr.Type == diagCgroupID && len(a.Value) >= 8 {
			return binary.NativeEndian.Uint64(a.Value)
		}
	}
	return 0
}

// seed enters the ports that were listened on before the kernel side counted,
// and drops seeds whose listener has gone. It never touches what the kernel
// side counts, so a port that is opened meanwhile is not lost. Ports that find
// no room make every port count as listening, until reclaim has made some.
func (b *Backend) seed(s *scope) error {
	var ports map[uint16]bpf.PortOwner
	err := s.def.NS.Do(func() (err error) {
		ports, err = listeningPorts()
		return err
	})
	if err != nil {
		return err
	}
	for p, owner := range ports {
		if isOwnPort(p) {
			continue
		}
		err := b.inst.Maps.RfPorts.Put(bpf.PortKey{Netns: s.cookie, Port: p, Seeded: 1}, &owner)
		if errors.Is(err, unix.E2BIG) {
			b.log.Warn("port table is full; every port counts as listening", "scope", s.name)
			err = b.inst.Maps.RfOverflow.Put(uint32(0), uint32(1))
		}
		if err != nil {
			return fmt.Errorf("enter listening port %d: %w", p, err)
		}
	}
	return sweepTable(b.inst.Maps.RfPorts, func(k bpf.PortKey) bool {
		return k.Netns == s.cookie && k.Seeded == 1 && ports[k.Port].Listeners == 0
	})
}

// reclaim frees port entries that count no listener, and seeds that are gone.
func (b *Backend) reclaim() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	keys, err := keysOf[bpf.PortKey](b.inst.Maps.RfPorts)
	errs := []error{err}
	stale := map[uint64]bool{}
	for _, k := range keys {
		if k.Seeded == 1 {
			stale[k.Netns] = true
			continue
		}
		errs = append(errs, b.reclaimPort(k))
	}
	for cookie := range stale {
		if s := b.ofNS(cookie); s != nil {
			errs = append(errs, b.seed(s))
		}
	}
	errs = append(errs, b.clearOverflow())
	return errors.Join(errs...)
}

// reclaimPort deletes an entry at zero. A listener that was counted between the two steps is put back.
func (b *Backend) reclaimPort(k bpf.PortKey) error {
	var p bpf.PortOwner
	if err := b.inst.Maps.RfPorts.Lookup(k, &p); err != nil || p.Listeners != 0 {
		return ignoreMissing(err)
	}
	if err := b.inst.Maps.RfPorts.LookupAndDelete(k, &p); err != nil || p.Listeners == 0 {
		return ignoreMissing(err)
	}
	return b.inst.Maps.RfPorts.Put(k, &p)
}

// clearOverflow ends the state in which every port counts as listening: lowered
// first, then every scope is seeded, and a port that finds no room raises it again.
func (b *Backend) clearOverflow() error {
	var full uint32
	if err := b.inst.Maps.RfOverflow.Lookup(uint32(0), &full); err != nil || full == 0 {
		return err
	}
	if err := b.inst.Maps.RfOverflow.Put(uint32(0), uint32(0)); err != nil {
		return err
	}
	for _, s := range b.scopes() {
		if err := b.seed(s); err != nil {
			return errors.Join(err, b.inst.Maps.RfOverflow.Put(uint32(0), uint32(1)))
		}
	}
	return nil
}

func (b *Backend) scopes() []*scope {
	b.index.RLock()
	defer b.index.RUnlock()
	out := make([]*scope, 0, len(b.byName))
	for _, s := range b.byName {
		out = append(out, s)
	}
	return out
}
