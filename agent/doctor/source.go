package doctor

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/attest/proc"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/bpf"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/cni/netns"
)

// host is what is asked of a machine. The fields are functions, so that a host
// can be examined that is not at hand.
type host struct {
	euid       func() int
	probe      func() []bpf.Feature
	variants   func(context.Context) ([]string, error) // of iptables, by name
	cgroupRoot func() (string, error)
	ipv6       func() error                  // nil when the family exists
	nofile     func() (uint64, error)        // the hard limit
	adjtime    func() (state int, err error) // of the kernel's clock discipline
	now        func() time.Time
	listening  func() ([]listener, error)
	rules      func(context.Context) (string, error) // in nft's or iptables-save's language
	owners     func(cgroupRoot string) ([]bpf.Owner, error)
	lsm        func() (string, error)
}

// listener is a TCP socket that listens, and a process that holds it (zero unknown).
type listener struct {
	at  netip.AddrPort
	pid uint32
}

func thisHost() host {
	return host{
		euid: os.Geteuid, probe: bpf.Probe, variants: variants, cgroupRoot: bpf.CgroupRoot,
		ipv6: hasIPv6, nofile: hardLimit, adjtime: adjtime, now: time.Now,
		listening: listening, rules: rulesOf, owners: bpf.Owners,
		lsm: func() (string, error) {
			data, err := os.ReadFile("/sys/kernel/security/lsm")
			return string(data), err
		},
	}
}

func variants(ctx context.Context) ([]string, error) {
	tools, err := fw.Find(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, v := range tools.Variants() {
		names = append(names, string(v))
	}
	return names, nil
}

func hasIPv6() error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func hardLimit() (uint64, error) {
	var lim unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim)
	return lim.Max, err
}

// adjtime asks whether something keeps the clock right (adjtimex(2)); it sets nothing.
func adjtime() (int, error) {
	var t unix.Timex
	return unix.Adjtimex(&t)
}

func listening() ([]listener, error) {
	self, err := netns.Self()
	if err != nil {
		return nil, err
	}
	defer self.Close()
	socks, err := sockdiag.Listeners(self)
	if err != nil {
		return nil, err
	}
	var list []listener
	for _, s := range socks {
		l := listener{at: s.Source}
		// Without a holder the port alone is named.
		if holders, err := proc.Holders(s.Inode); err == nil && len(holders) > 0 {
			l.pid = holders[0].PID
		}
		list = append(list, l)
	}
	return list, nil
}

// rulesOf reads the packet filter of this network namespace through whatever
// tool is there. No tool means that nobody wrote rules with one.
func rulesOf(ctx context.Context) (string, error) {
	var all strings.Builder
	var failed []error
	tried := 0
	for _, args := range [][]string{{"nft", "list", "ruleset"}, {"iptables-legacy-save"}, {"iptables-save"}} {
		path, err := exec.LookPath(args[0])
		if err != nil {
			continue
		}
		tried++
		out, err := exec.CommandContext(ctx, path, args[1:]...).Output()
		if err != nil {
			failed = append(failed, errors.New(strings.Join(args, " ")+": "+err.Error()))
			continue
		}
		all.Write(out)
		all.WriteByte('\n')
	}
	if tried > 0 && len(failed) == tried {
		return "", errors.Join(failed...)
	}
	return all.String(), nil
}
