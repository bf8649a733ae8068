package iptables

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"go.uber.org/goleak"

	"ringfence.dev/attest/cgroup"
)

// helperEnv makes the test binary a workload, or a guard, in place of the tests.
const helperEnv = "RF_IPTABLES_HELPER"

// Cgroups of this run: the test process, which is the agent, is alone in agent.
var cg struct{ root, base, agent, work, other string }

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		os.Exit(helper(os.Args[1:]))
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	home, err := enterLeaf()
	if err != nil {
		fmt.Fprintln(os.Stderr, "enter a cgroup of our own:", err)
		os.Exit(1)
	}
	code := m.Run()
	if code == 0 {
		// One thread that opens sockets lives as long as the process.
		if err := goleak.Find(goleak.IgnoreAnyFunction("ringfence.dev/cni/netns.(*openerThread).start.func1")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if err := leaveLeaf(home); err != nil {
		fmt.Fprintln(os.Stderr, "leave our cgroup:", err)
		code = 1
	}
	os.Exit(code)
}

func enterLeaf() (home string, err error) {
	tree, err := cgroup.Open(cgroup.Config{})
	if err != nil {
		return "", err
	}
	if home, err = ownCgroup(); err != nil {
		return "", err
	}
	cg.root = tree.Root()
	cg.base = "/rf-test-" + strconv.Itoa(os.Getpid())
	cg.agent, cg.work, cg.other = cg.base+"/agent", cg.base+"/work", cg.base+"/other"
	for _, dir := range []string{cg.base, cg.agent, cg.work, cg.other, cg.other + "/deep"} {
		if err := os.Mkdir(filepath.Join(cg.root, dir), 0o755); err != nil {
			return "", err
		}
	}
	return home, move(cg.agent)
}

func move(to string) error {
	return os.WriteFile(filepath.Join(cg.root, to, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

func leaveLeaf(home string) error {
	errs := []error{move(home)}
	for _, dir := range []string{cg.other + "/deep", cg.other, cg.work, cg.agent, cg.base} {
		errs = append(errs, os.Remove(filepath.Join(cg.root, dir)))
	}
	return errors.Join(errs...)
}
