package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/agent/capture"
	"ringfence.dev/agent/capture/ebpf"
	"ringfence.dev/agent/capture/iptables"
	"ringfence.dev/agent/capture/observe"
	"ringfence.dev/attest/cgroup"
	"ringfence.dev/attest/sockdiag"
	"ringfence.dev/bpf"
	fw "ringfence.dev/cni/iptables"
	"ringfence.dev/cni/netns"
	"ringfence.dev/policy/authz"
)

// joinLeaf makes sure that the agent is alone in its cgroup: that leaf is the
// loop guard of every back end. A service manager's cgroup that holds nobody
// else is one already.
func (a *Agent) joinLeaf(closers *stack) error {
	root, err := bpf.CgroupRoot()
	if err != nil {
		a.log.Warn("no cgroup v2 on this host: only watching works", "err", err)
		return nil
	}
	own, err := ownCgroup()
	if err != nil {
		return err
	}
	leaf := own
	if own == "/" || !aloneIn(filepath.Join(root, own)) {
		leaf = leafBeside(own, a.settings.Instance)
	}
	if a.leaf, err = ebpf.JoinLeaf(root, leaf); err != nil {
		return fmt.Errorf("move into a cgroup of our own: %w", err)
	}
	a.leafPath = leaf
	if leaf != own {
		closers.push("cgroup", func() error {
			return leaveLeaf(filepath.Join(root, own), filepath.Join(root, leaf), a.keep)
		})
	}
	return nil
}

// leafBeside says where the agent goes that is not alone in its cgroup. Inside a
// service it stays below the service's own, where the service manager looks for it.
func leafBeside(own, instance string) string {
	if strings.HasSuffix(own, ".service") {
		return own + "/" + leafName(instance)
	}
	return "/" + leafName(instance)
}

// leaveLeaf goes back to where the process was started and removes the leaf,
// unless rules that stay in the kernel name it. Either may be impossible by now
// (somebody removed the one, a guard is still in the other); the leaf is then
// left to the next start or to Cleanup.
func leaveLeaf(home, leaf string, keep bool) error {
	err := os.WriteFile(filepath.Join(home, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644)
	if err != nil || keep {
		return nil
	}
	if err := os.Remove(leaf); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func leafName(instance string) string { return "ringfence-" + instance }

// ownCgroup is this process's path in the v2 hierarchy (cgroups(7)).
func ownCgroup() (string, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for _, line := range strings.Split(string(data), "\n") {
		if p, ok := strings.CutPrefix(line, "0::"); ok {
			return path.Clean(p), nil
		}
	}
	return "", errors.New("/proc/self/cgroup has no entry of cgroup v2")
}

func aloneIn(dir string) bool {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return false
	}
	pids := strings.Fields(string(data))
	return len(pids) == 1 && pids[0] == strconv.Itoa(os.Getpid())
}

// openBackend chooses by trying: what loads and attaches is what the kernel can do.
func (a *Agent) openBackend(ctx context.Context, closers *stack) (err error) {
	if a.keep, err = a.keepsBefore(ctx); err != nil {
		return err
	}
	kind := a.settings.Capture
	if kind == "auto" || kind == "ebpf" {
		b, err := ebpf.New(ebpf.Config{
			Instance: a.settings.Instance, AgentCgroup: strconv.FormatUint(a.leaf, 10), Log: a.log,
		})
		if err == nil {
			a.useBackend(b, "the kernel has all that the eBPF back end needs", closers)
			return nil
		}
		if kind == "ebpf" {
			return fmt.Errorf("capture ebpf: %w (`ringfence doctor` tells what the kernel lacks)", err)
		}
		a.backendReason = "no eBPF: " + err.Error()
	}
	watching, err := a.onlyWatches()
	if err != nil {
		return err
	}
	if kind == "auto" && watching {
		a.useBackend(observe.New(), a.backendReason+"; scopes are only watched: "+sampling, closers)
		return nil
	}
	if kind == "auto" || kind == "iptables" {
		b, err := a.openIptables(ctx, closers)
		if err == nil {
			a.listenControl = iptables.ListenControl
			a.useBackend(b, or(a.backendReason, "chosen in the settings"), closers)
			return nil
		}
		return fmt.Errorf("capture iptables: %w (`ringfence doctor` tells what is missing)", err)
	}
	a.useBackend(observe.New(), "chosen in the settings: "+sampling, closers)
	return nil
}

const sampling = "socket tables are sampled once a second, no packet filter is loaded"

// openIptables starts the back end with its guard, a process of this same
// program that acts when the agent is gone.
func (a *Agent) openIptables(ctx context.Context, closers *stack) (capture.Backend, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	guard, err := iptables.StartGuard(self, "agent", "--guard")
	if err != nil {
		return nil, err
	}
	b, err := iptables.New(ctx, iptables.Config{Leaf: a.leafPath, Guard: guard, Log: a.log})
	if err != nil {
		return nil, errors.Join(err, guard.Close())
	}
	closers.push("iptables guard", guard.Close)
	return b, nil
}

// Guard is the whole work of the process that openIptables starts.
func Guard(ctx context.Context, log *slog.Logger) error {
	conn, err := iptables.OpenGuardFD()
	if err != nil {
		return err
	}
	return iptables.RunGuard(ctx, conn, log)
}

func (a *Agent) useBackend(b capture.Backend, why string, closers *stack) {
	a.backend, a.backendReason = b, why
	a.closeBackend = sync.OnceValue(func() error { return b.Close(!a.keep) })
	closers.push("capture", a.closeBackend)
}

// onlyWatches reports whether neither the settings nor the last run have a scope
// in another mode than watch.
func (a *Agent) onlyWatches() (bool, error) {
	saved, err := a.savedScopes()
	for _, s := range saved {
		if s.Mode != authz.Watch {
			return false, err
		}
	}
	return a.settings.OnlyWatches(), err
}

// keepsBefore settles what a start that fails does with the kernel's state: what
// a dead predecessor left of a scope that is meant to be enforced is protection, and stays.
func (a *Agent) keepsBefore(ctx context.Context) (bool, error) {
	saved, err := loadScopes(a.settings.StateDir)
	if err != nil {
		return false, err
	}
	scopes := slices.Clone(a.settings.Scopes)
	for _, s := range saved {
		scopes = append(scopes, s.ScopeSettings)
	}
	scopes = slices.DeleteFunc(scopes, func(s ScopeSettings) bool { return s.Mode != authz.Enforce })
	if len(scopes) == 0 {
		return false, nil
	}
	if _, err := os.Stat(filepath.Join(bpf.DefaultPinRoot, a.settings.Instance)); err == nil {
		return true, nil
	}
	return slices.ContainsFunc(scopes, func(s ScopeSettings) bool { return hasRules(ctx, s) }), nil
}

// hasRules reports whether a scope's namespace holds packet filter rules of ours.
func hasRules(ctx context.Context, s ScopeSettings) bool {
	ns, err := netns.Self()
	if !s.Host {
		ns, err = netns.Open(s.Path)
	}
	if err != nil {
		return false
	}
	defer ns.Close()
	tools, err := fw.Find(ctx)
	if err != nil {
		return false
	}
	rules, err := tools.Open(ctx, ns)
	return err == nil && len(rules.Verify(ctx, map[fw.Family]fw.Ruleset{})) > 0
}

// Cleanup removes what a stopped agent left in the kernel: pinned programs,
// packet filter rules, its cgroup. Its scopes are open afterwards. Cleaning up
// twice, or after nothing, is no error.
//
// A running agent is not touched: it is an error.
func Cleanup(ctx context.Context, s Settings) (err error) {
	lock, err := lockInstance(s.Instance)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.remove()) }()
	if err := leafEmpty(ctx, leafName(s.Instance)); err != nil {
		return err
	}
	var errs []error
	if err := bpf.Cleanup(bpf.DefaultPinRoot, s.Instance); err != nil {
		errs = append(errs, err)
	}
	scopes, err := loadScopes(s.StateDir)
	errs = append(errs, err)
	for _, sc := range scopes {
		errs = append(errs, cleanupRules(ctx, sc.ScopeSettings))
	}
	for _, sc := range s.Scopes {
		errs = append(errs, cleanupRules(ctx, sc))
	}
	errs = append(errs, saveScopes(s.StateDir, nil))
	if root, err := bpf.CgroupRoot(); err == nil {
		err := os.Remove(filepath.Join(root, leafName(s.Instance)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove the agent's cgroup (is the agent stopped?): %w", err))
		}
	}
	return errors.Join(errs...)
}

// guardWait bounds the wait for a dead agent's guard, which writes the last wills of
// all scopes within a minute.
const guardWait = 70 * time.Second

// leafEmpty waits until nobody is left in a dead agent's cgroup. Its guard may
// still be writing rules there, which must not come after they were removed.
func leafEmpty(ctx context.Context, leaf string) error {
	root, err := bpf.CgroupRoot()
	if err != nil {
		return nil // without cgroups there is no guard
	}
	ctx, cancel := context.WithTimeout(ctx, guardWait)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		procs, err := os.ReadFile(filepath.Join(root, leaf, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(procs) == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("somebody is still in the agent's cgroup (processes %s): %w",
				strings.Join(strings.Fields(string(procs)), " "), context.Cause(ctx))
		}
	}
}

// nobodyServes refuses to take rules away under an agent of another instance. A
// listener alone proves nothing, since anybody may bind a dead agent's port where
// no hook keeps it; only root makes a cgroup of that name.
func nobodyServes(ctx context.Context, ns *netns.Handle) error {
	tree, err := cgroup.Open(cgroup.Config{})
	if err != nil {
		return nil // without cgroups there are no rules
	}
	conn, err := sockdiag.Open(ns)
	if err != nil {
		return err
	}
	defer conn.Close()
	listeners, err := conn.ListenersOn(ctx, capture.OutboundPort)
	if err != nil {
		return err
	}
	for _, l := range listeners {
		if p, err := tree.Path(l.CgroupID); err == nil && strings.HasPrefix(path.Base(p), leafName("")) {
			return fmt.Errorf("another agent, of cgroup %s, serves it: remove the scope there first", p)
		}
	}
	return nil
}

func cleanupRules(ctx context.Context, s ScopeSettings) error {
	ns, err := netns.Self()
	if !s.Host {
		ns, err = netns.Open(s.Path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the namespace is gone, and its rules with it
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := nobodyServes(ctx, ns); err != nil {
		return fmt.Errorf("scope %s: %w", s.Name, err)
	}
	tools, err := fw.Find(ctx)
	if errors.Is(err, fw.ErrNotFound) {
		return nil // nobody can have written rules
	}
	if err != nil {
		return err
	}
	rules, err := tools.Open(ctx, ns)
	if err != nil {
		return err
	}
	return rules.Remove(ctx)
}
