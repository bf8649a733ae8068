package bpf

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Answer is what a probe found.
type Answer uint8

const (
	Unknown Answer = iota // the probe itself failed, for want of privilege say
	No
	Yes
)

func (a Answer) String() string {
	return [...]string{"could not tell", "not supported", "yes"}[a]
}

// MarshalText writes the answer's words.
func (a Answer) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// Feature is one capability of the kernel that capture uses.
type Feature struct {
	Name      string `json:"name"`
	Answer    Answer `json:"answer"`
	MinKernel string `json:"min_kernel"` // first upstream release that has it
	Required  bool   `json:"required"`   // without it the eBPF back end is not used
	Cost      string `json:"cost"`       // what is lost without it
	Fallback  string `json:"fallback"`   // what happens instead
	Err       string `json:"error,omitempty"`
}

// ErrNotSupported is matched by every [*FeatureError].
var ErrNotSupported = errors.New("bpf: not supported by this kernel")

// FeatureError reports a required feature that is missing.
type FeatureError struct {
	Feature   string
	MinKernel string
}

func (e *FeatureError) Error() string {
	return fmt.Sprintf("bpf: kernel lacks %s (Linux %s and later have it)", e.Feature, e.MinKernel)
}

// Is makes the error match [ErrNotSupported].
func (e *FeatureError) Is(target error) bool { return target == ErrNotSupported }

const (
	toIptables    = "the iptables back end"
	featureRetval = "error number of a refusal"
	featureBTF    = "kernel type information (BTF)"
)

type probe struct {
	Feature
	ask func() error
}

// Probe asks the kernel for each capability, by trying it; it never compares
// kernel versions. Answers are fresh at each call.
func Probe() []Feature {
	memlockErr := rlimit.RemoveMemlock()
	var out []Feature
	for _, p := range probes() {
		f := p.Feature
		err := p.ask()
		f.Answer = answerOf(err)
		if f.Answer == Unknown && memlockErr != nil {
			err = errors.Join(err, memlockErr)
		}
		if err != nil {
			f.Err = err.Error()
		}
		out = append(out, f)
	}
	return out
}

func answerOf(err error) Answer {
	switch {
	case err == nil:
		return Yes
	case errors.Is(err, ebpf.ErrNotSupported):
		return No
	default:
		return Unknown
	}
}

func probes() []probe {
	helper := func(t ebpf.ProgramType, fns ...asm.BuiltinFunc) func() error {
		return func() error {
			for _, fn := range fns {
				if err := features.HaveProgramHelper(t, fn); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return []probe{
		{Feature{Name: "cgroup connect hooks", MinKernel: "4.17", Required: true,
			Cost: "no capture at connect(2)", Fallback: toIptables},
			func() error { return features.HaveProgramType(ebpf.CGroupSockAddr) }},
		{Feature{Name: "socket storage in connect hooks", MinKernel: "5.8", Required: true,
			Cost: "no place for what a workload dialled", Fallback: toIptables},
			helper(ebpf.CGroupSockAddr, asm.FnSkStorageGet, asm.FnSkLookupTcp, asm.FnSetsockopt)},
		{Feature{Name: "ring buffer", MinKernel: "5.8", Required: true,
			Cost: "no events", Fallback: toIptables},
			func() error { return features.HaveMapType(ebpf.RingBuf) }},
		{Feature{Name: "sk_lookup", MinKernel: "5.9", Required: true,
			Cost: "no inbound steering", Fallback: toIptables},
			func() error { return features.HaveProgramType(ebpf.SkLookup) }},
		{Feature{Name: "namespace cookie of a socket", MinKernel: "5.14", Required: true,
			Cost: "scopes cannot be told apart", Fallback: toIptables}, haveCookie},
		{Feature{Name: "namespace cookie in sockops", MinKernel: "5.15", Required: true,
			Cost: "a note cannot be filed before the SYN", Fallback: toIptables},
			helper(ebpf.SockOps, asm.FnGetNetnsCookie, asm.FnSkStorageGet)},
		{Feature{Name: featureRetval, MinKernel: "5.18",
			Cost:     "a refused connect(2) says EPERM instead of ECONNREFUSED",
			Fallback: "EPERM"}, helper(ebpf.CGroupSockAddr, asm.FnSetRetval)},
		{Feature{Name: featureBTF, MinKernel: "5.13",
			Cost:     "no start time and exec count from the hook, so attestation asks /proc; kernel sockets are known by their privileged port only",
			Fallback: "pidfd and /proc"}, haveBTF},
	}
}

// haveBTF covers what the code behind rf_btf needs: the types, and the helpers in each kind of program.
func haveBTF() error {
	if _, err := btf.LoadKernelSpec(); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%v: %w", err, ebpf.ErrNotSupported)
		}
		return err
	}
	needs := []struct {
		t  ebpf.ProgramType
		fn asm.BuiltinFunc
	}{
		{ebpf.CGroupSockAddr, asm.FnGetCurrentTask},
		{ebpf.CGroupSockAddr, asm.FnProbeReadKernel},
		{ebpf.CGroupSockAddr, asm.FnSkcToTcpSock},
		{ebpf.CGroupSock, asm.FnGetCurrentTask},
		{ebpf.CGroupSock, asm.FnProbeReadKernel},
		{ebpf.SockOps, asm.FnSkcToTcpSock},
	}
	for _, n := range needs {
		if err := features.HaveProgramHelper(n.t, n.fn); err != nil {
			return err
		}
	}
	return nil
}

func haveCookie() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return fmt.Errorf("SO_NETNS_COOKIE: %w", ebpf.ErrNotSupported)
	}
	return err
}
