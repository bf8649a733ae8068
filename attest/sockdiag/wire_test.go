package sockdiag

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// answer builds what the kernel would send.
func answer(typ, flags uint16, seq uint32, payload []byte) []byte {
	le := binary.NativeEndian
	b := make([]byte, headerSize, headerSize+len(payload)+4)
	le.PutUint32(b[0:], uint32(headerSize+len(payload)))
	le.PutUint16(b[4:], typ)
	le.PutUint16(b[6:], flags)
	le.PutUint32(b[8:], seq)
	b = append(b, payload...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

func listener(attrs ...byte) []byte {
	b := make([]byte, messageSize)
	b[0], b[1] = unix.AF_INET6, Listen
	binary.BigEndian.PutUint16(b[4:], 443)
	b[8+15] = 1 // ::1
	binary.NativeEndian.PutUint32(b[64:], 33)
	binary.NativeEndian.PutUint32(b[68:], 4711)
	return append(b, attrs...)
}

func attr(typ uint16, value ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, value...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

func TestParseSocket(t *testing.T) {
	cg := binary.NativeEndian.AppendUint64(nil, 1<<33+5)
	b := listener(append(append(attr(8, 0), attr(attrV6Only, 1)...), attr(attrCgroupID, cg...)...)...)
	s, err := parseSocket(b)
	want := Socket{
		Family: unix.AF_INET6, State: Listen, UID: 33, Inode: 4711, V6Only: true, CgroupID: 1<<33 + 5,
		Source: netip.MustParseAddrPort("[::1]:443"), Destination: netip.MustParseAddrPort("[::]:0"),
	}
	if err != nil || s != want {
		t.Errorf("%+v (%v), want %+v", s, err, want)
	}
	mapped := listener()
	copy(mapped[8:], netip.MustParseAddr("::ffff:192.0.2.7").AsSlice())
	if s, err := parseSocket(mapped); err != nil || s.Source.String() != "192.0.2.7:443" {
		t.Errorf("mapped source %s (%v)", s.Source, err)
	}
}

func TestParseSocketRefuses(t *testing.T) {
	family := listener()
	family[0] = unix.AF_UNIX
	for name, b := range map[string][]byte{
		"empty": nil, "short": listener()[:messageSize-1], "family": family,
		"attribute below its header": listener(3, 0, 11, 0), "attribute beyond the end": listener(9, 0, 11, 0, 1),
	} {
		if s, err := parseSocket(b); !errors.Is(err, errMalformed) {
			t.Errorf("%s: %+v (%v)", name, s, err)
		}
	}
	// A value of the wrong size is not ours to guess at.
	if s, err := parseSocket(listener(attr(attrCgroupID, 1, 2, 3)...)); err != nil || s.CgroupID != 0 {
		t.Errorf("short cgroup id: %d (%v)", s.CgroupID, err)
	}
}

func TestMessages(t *testing.T) {
	one := answer(typeByFamily, unix.NLM_F_MULTI, 5, listener())
	done := answer(unix.NLMSG_DONE, unix.NLM_F_MULTI, 5, make([]byte, 4))
	code := func(errno unix.Errno) []byte {
		return answer(unix.NLMSG_ERROR, 0, 5, binary.NativeEndian.AppendUint32(nil, uint32(-int32(errno))))
	}
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		in    []byte
		fn    error
		n     int
		done  bool
		wants error
	}{
		"nothing":          {},
		"one, not over":    {in: one, n: 1},
		"one and over":     {in: append(bytes.Clone(one), done...), n: 1, done: true},
		"single answer":    {in: answer(typeByFamily, 0, 5, listener()), n: 1, done: true},
		"of another":       {in: answer(typeByFamily, 0, 4, listener())},
		"error":            {in: code(unix.ENOENT), done: true, wants: unix.ENOENT},
		"ack":              {in: code(0), done: true},
		"interrupted":      {in: append(answer(typeByFamily, unix.NLM_F_MULTI|unix.NLM_F_DUMP_INTR, 5, listener()), done...), n: 1, done: true, wants: errInterrupted},
		"refused, is over": {in: append(bytes.Clone(one), done...), fn: boom, n: 1, done: true, wants: boom},
		"dump fails":       {in: answer(unix.NLMSG_DONE, unix.NLM_F_MULTI, 5, binary.NativeEndian.AppendUint32(nil, ^uint32(3))), done: true, wants: unix.Errno(4)},
		"short error":      {in: answer(unix.NLMSG_ERROR, 0, 5, nil), done: true, wants: errMalformed},
		"unknown type":     {in: answer(99, 0, 5, nil), wants: errMalformed},
		"cut header":       {in: one[:10], wants: errMalformed},
		"cut payload":      {in: one[:40], wants: errMalformed},
		"length too small": {in: append([]byte{4, 0, 0, 0}, make([]byte, 12)...), wants: errMalformed},
	} {
		n := 0
		over, err := messages(c.in, 5, func([]byte) error { n++; return c.fn })
		if n != c.n || over != c.done || !errors.Is(err, c.wants) || (err == nil) != (c.wants == nil) {
			t.Errorf("%s: %d answers, over %v, %v", name, n, over, err)
		}
	}
}

// The attribute parser meets whatever a kernel, of any version, sends.
func FuzzParse(f *testing.F) {
	f.Add(listener())
	f.Add(listener(attr(attrV6Only, 1)...))
	f.Add(answer(typeByFamily, unix.NLM_F_MULTI, 1, listener()))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseSocket(b); err == nil {
			if s.Source.Addr().Is4In6() || !s.Source.IsValid() {
				t.Errorf("source %s", s.Source)
			}
		}
		calls := 0
		messages(b, 1, func(p []byte) error { calls++; _, err := parseSocket(p); return err })
		if calls > len(b)/headerSize {
			t.Errorf("%d answers in %d bytes", calls, len(b))
		}
	})
}
