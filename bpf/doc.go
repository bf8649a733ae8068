// Package bpf holds ringfence's BPF programs and what loads, attaches, pins and
// reads them. It moves bytes between the kernel and typed values; which scope
// gets which treatment is decided by the capture back end above it.
//
// One instance (one agent) has one directory below the pin root on bpffs:
//
//	<instance>/links/rf_connect4 ...   links at the root of the cgroup v2 tree
//	<instance>/maps-<layout>/rf_scopes ...   tables; layout is a tag of their shapes
//	<instance>/steer/<netns cookie>    sk_lookup links, one per namespace
//
// The directory appears in one step, by rename. The next agent of the instance
// takes the links over by replacing their programs, and the tables too when
// their layout is its own, so that nothing is uncovered in between. After a
// crash the pins stay: programs go on by the last word in the tables, and find
// by themselves that the agent is gone. After a reboot bpffs is empty.
//
// Why one program set at the cgroup root instead of one per workload: nothing
// has to be attached in time when a container starts, children inherit it, and
// several agents can stand side by side, since each ignores namespaces that are
// not in its own tables.
package bpf
