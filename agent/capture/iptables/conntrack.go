package iptables

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"ringfence.dev/cni/netns"
)

// conntrack reads one namespace's connection tracking counters. Redirection
// stands on conntrack: when its table is full, new connections fail.
type conntrack struct {
	ns    *netns.Handle
	start uint64 // drops that were counted before the scope was added
}

func newConntrack(ns *netns.Handle) conntrack { return conntrack{ns: ns} }

func (c *conntrack) begin() { c.start, _ = c.counted() }

// drops is how many packets were dropped since begin because the table was full
// or an entry could not be made.
func (c *conntrack) drops() (uint64, error) {
	n, err := c.counted()
	return n - min(n, c.start), err
}

func (c *conntrack) counted() (n uint64, err error) {
	err = c.inside(func() error {
		f, err := os.Open("/proc/thread-self/net/stat/nf_conntrack")
		if err != nil {
			return err
		}
		defer f.Close()
		n, err = parseDrops(f)
		return err
	})
	return n, err
}

// fill is the number of tracked connections and the bound, which all namespaces
// of a machine share as a number though each has a count of its own.
func (c *conntrack) fill() (entries, bound int, err error) {
	err = c.inside(func() (err error) {
		if entries, err = readInt("/proc/sys/net/netfilter/nf_conntrack_count"); err == nil {
			bound, err = readInt("/proc/sys/net/netfilter/nf_conntrack_max")
		}
		return err
	})
	return entries, bound, err
}

func (c *conntrack) inside(fn func() error) error {
	if c.ns == nil {
		return errors.New("conntrack: no namespace")
	}
	return c.ns.Do(fn)
}

// parseDrops adds up, over all processors, the column that counts packets
// refused because no entry could be made. The columns are hexadecimal and named in the first line
// (net/netfilter/nf_conntrack_standalone.c, ct_cpu_seq_show).
func parseDrops(r io.Reader) (total uint64, err error) {
	lines := bufio.NewScanner(r)
	if !lines.Scan() {
		return 0, errors.New("conntrack statistics are empty")
	}
	head := strings.Fields(lines.Text())
	for lines.Scan() {
		for i, field := range strings.Fields(lines.Text()) {
			if i < len(head) && head[i] == "drop" {
				n, err := strconv.ParseUint(field, 16, 64)
				if err != nil {
					return 0, fmt.Errorf("conntrack statistics: %w", err)
				}
				total += n
			}
		}
	}
	return total, lines.Err()
}

func readInt(path string) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}
