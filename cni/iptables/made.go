package iptables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// madeHere is an empty chain of ours in each table that was not there before us. It
// says so to whoever cleans up, which may be another process, years later. Only
// the nft variant knows tables that come and go.
const madeHere = Prefix + "MADE"

// marked adds the mark to the tables that want needs and that are not there, or
// carry it already.
func (r Ruleset) marked(have state) Ruleset {
	for _, table := range tableOrder {
		chains, there := have[table]
		_, made := chains[madeHere]
		if r.uses(table) && (!there || made) {
			r = append(slices.Clip(r), Chain{Table: table, Name: madeHere})
		}
	}
	return r
}

func (r Ruleset) uses(table string) bool {
	return slices.ContainsFunc(r, func(c Chain) bool { return c.Table == table })
}

// madeHereFor lists the marked tables that want no longer needs.
func (s state) madeHereFor(want Ruleset) (tables []string) {
	for table, chains := range s {
		if _, made := chains[madeHere]; made && !want.uses(table) {
			tables = append(tables, table)
		}
	}
	return tables
}

// dispose removes tables of ours that nobody has begun to use: their built-in chains
// are empty and let everything pass. The kernel itself refuses to remove a chain
// that has a rule by then, or a table that has a chain. What fails, stays: an
// empty table changes no packet.
func (t *Tools) dispose(ctx context.Context, f Family, tables []string) {
	if len(tables) == 0 {
		return
	}
	text, err := run(ctx, "", t.programs[NFT][f].save)
	if err != nil {
		return
	}
	idle := idleTables(text)
	for _, table := range tables {
		chains, ok := idle[table]
		for _, chain := range chains {
			err := remove(f, table, chain)
			// Programs from 1.8.9 on print built-in chains that they have never made.
			ok = ok && (err == nil || errors.Is(err, unix.ENOENT))
		}
		if ok {
			_ = remove(f, table, "")
		}
	}
}

// idleTables lists the chains of the tables in which nothing is but built-in
// chains without rules, whose policy is to accept.
func idleTables(text string) map[string][]string {
	idle := map[string][]string{}
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
			idle[table] = nil
		case line == "" || line == "COMMIT":
		case line[0] == '#':
			if strings.Contains(line, "incompatible") {
				return nil // something that only nft(8) can show
			}
		case line[0] == ':':
			chain, policy, _ := strings.Cut(line[1:], " ")
			if _, still := idle[table]; still && strings.HasPrefix(policy, "ACCEPT") {
				idle[table] = append(idle[table], chain)
				continue
			}
			delete(idle, table)
		default:
			delete(idle, table)
		}
	}
	return idle
}

// nf_tables, include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h: the numbers that
// removing an empty chain or table needs.
const (
	batchBegin  = 16 // NFNL_MSG_BATCH_BEGIN
	batchEnd    = 17 // NFNL_MSG_BATCH_END
	subsystem   = 10 // NFNL_SUBSYS_NFTABLES
	delTable    = subsystem<<8 | 2
	delChain    = subsystem<<8 | 5
	attrTable   = 1     // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE
	attrChain   = 3     // NFTA_CHAIN_NAME
	onlyIfEmpty = 0x100 // NLM_F_NONREC
)

var answerLimit = unix.NsecToTimeval(int64(time.Second))

// remove removes an empty chain, or without a chain's name an empty table, of the
// thread's namespace. It is EBUSY when there is something in it.
func remove(f Family, table, chain string) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &answerLimit); err != nil {
		return err
	}
	family, kind, attrs := byte(unix.NFPROTO_IPV4), uint16(delTable), attribute(attrTable, table)
	if f == IPv6 {
		family = unix.NFPROTO_IPV6
	}
	if chain != "" {
		kind, attrs = delChain, append(attrs, attribute(attrChain, chain)...)
	}
	batch := message(batchBegin, 0, unix.AF_UNSPEC, subsystem, nil)
	batch = append(batch, message(kind, unix.NLM_F_ACK|onlyIfEmpty, family, 0, attrs)...)
	batch = append(batch, message(batchEnd, 0, unix.AF_UNSPEC, subsystem, nil)...)
	if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	var buf [4096]byte
	n, _, err := unix.Recvfrom(fd, buf[:], 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(buf[4:]) != unix.NLMSG_ERROR {
		return fmt.Errorf("remove %s %s: unexpected answer of %d bytes", table, chain, n)
	}
	if code := int32(binary.NativeEndian.Uint32(buf[unix.SizeofNlMsghdr:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

// message is a netlink message with a struct nfgenmsg.
func message(kind, flags uint16, family byte, resource uint16, attrs []byte) []byte {
	b := make([]byte, unix.SizeofNlMsghdr+4, unix.SizeofNlMsghdr+4+len(attrs))
	binary.NativeEndian.PutUint32(b, uint32(cap(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], flags|unix.NLM_F_REQUEST)
	b[unix.SizeofNlMsghdr] = family
	binary.BigEndian.PutUint16(b[unix.SizeofNlMsghdr+2:], resource)
	return append(b, attrs...)
}

// attribute is a netlink attribute that holds a string.
func attribute(kind uint16, text string) []byte {
	size := unix.SizeofNlAttr + len(text) + 1
	b := make([]byte, (size+3)&^3)
	binary.NativeEndian.PutUint16(b, uint16(size))
	binary.NativeEndian.PutUint16(b[2:], kind)
	copy(b[unix.SizeofNlAttr:], text)
	return b
}
