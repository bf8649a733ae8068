/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * The tables of one agent instance. All but rf_events' consumer position are
 * pinned under the instance's directory, so they outlive the agent.
 */
#ifndef RINGFENCE_MAPS_H
#define RINGFENCE_MAPS_H

#include "ringfence.h"
#include <bpf/bpf_helpers.h>

/* Set by the loader before the programs are verified; what is false costs nothing. */
volatile const __u32 rf_btf = 0;     /* kernel BTF and bpf_probe_read_kernel are there */
volatile const __u32 rf_retval = 0;  /* bpf_set_retval, Linux 5.18 */
volatile const __u64 rf_netns = 0;   /* of the namespace an rf_steer is attached to; each has its own copy */

/* Key: netns cookie. Written by the agent, last of all when a scope is added and first when it is
 * removed: its presence is what makes a scope live. Read by every program. Full: Add fails. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct scope);
} rf_scopes SEC(".maps");

/* One entry: the agent. Written by the agent (heartbeat every 250 ms), read by every program. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct agent);
} rf_agent SEC(".maps");

/* Key: {netns, cgroup}. Value: 1 covered, 0 excepted; absent counts as covered. Written by the agent
 * for host scopes, until the scope is removed. Full: SetCgroups fails, and what is missing is covered. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct cgroup_key);
	__type(value, __u32);
} rf_cgroups SEC(".maps");

/* Key: the connection. Value: its note. rf_flows writes it when the source port is known and the SYN
 * not yet sent; the agent takes it out when it accepts. Full: the oldest gives way, and its connection is reset. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct conn_key);
	__type(value, struct note);
} rf_notes SEC(".maps");

/* Key: a connection of the agent to a local workload, which rf_steer leaves alone. Value: the client to show.
 * rf_flows writes it before the SYN and takes it out when the workload's side is established or the agent's
 * socket closes. Full: the oldest gives way. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct conn_key);
	__type(value, struct exemption);
} rf_exempt SEC(".maps");

/* Per socket, freed with it. Written by the connect, sock_create and sockops programs and, for its own
 * sockets, by the agent. No memory: an enforcing scope refuses the connect. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sock_state);
} rf_socks SEC(".maps");

/* Per socket, inherited by what a listener accepts: marks the agent's own listeners, written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, __u32);
} rf_own SEC(".maps");

/* Key: {netns, port, who found it}. Value: how many listeners, and whose. Entries of the kernel side are counted by
 * rf_flows and never deleted by it, since a listener may come while another goes; the agent reclaims
 * those at zero. Full: rf_overflow is raised, by whoever finds no room, and every port counts as listening. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct port_key);
	__type(value, struct port);
} rf_ports SEC(".maps");

/* One entry: not zero once rf_ports was full. Written by rf_flows and the agent, cleared by the agent when
 * all listening ports have found room. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} rf_overflow SEC(".maps");

/* Key: {netns, family}. Value: the agent's inbound listener; vanishes when it closes. Written by the agent, read by rf_steer. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 4096);
	__type(key, struct listener_key);
	__type(value, __u64);
} rf_listeners SEC(".maps");

/* Key: {netns, prefix}. Value: how the namespace routes it. Written by the agent, which follows the kernel's
 * route messages. Full: the scope gets RF_ROUTES_UNKNOWN. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct route_key);
	__type(value, struct route);
} rf_routes SEC(".maps");

/* Key: who and where. Value: for how long. Written by the agent, read by connect. Full: the oldest gives way. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct deny_key);
	__type(value, struct deny);
} rf_denies SEC(".maps");

/* Key: one life of a thread group. Value: its exec id after the latest execve. Written by rf_exec, read by the
 * agent, which so learns that a process has become another image since it connected. Full: the oldest gives
 * way; an execve that was forgotten goes unnoticed, unless its executable differs when it is looked at. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct image_key);
	__type(value, __u64);
} rf_execs SEC(".maps");

/* One entry: how often a listening socket has come or gone in any scope. Written by rf_flows; the agent maps
 * it and reads it without a system call, to know that what it found out about listeners still holds. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} rf_listens SEC(".maps");

/* What was seen, for the agent. Full: the event is dropped and counted as RF_EVENT_LOST. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} rf_events SEC(".maps");

/* Index: enum rf_reason. Written by every program, read by the agent; never reset. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RF_REASONS);
	__type(key, __u32);
	__type(value, __u64);
} rf_counters SEC(".maps");

static __always_inline void count(__u32 reason)
{
	__u64 *n = bpf_map_lookup_elem(&rf_counters, &reason);

	if (n)
		(*n)++; /* per CPU; an update lost to preemption costs one in a statistic */
}

static __always_inline struct scope *scope_of(__u64 netns)
{
	return bpf_map_lookup_elem(&rf_scopes, &netns);
}

static __always_inline int is_excepted(__u64 netns, __u64 cgroup)
{
	struct cgroup_key key = { .netns = netns, .cgroup = cgroup };
	__u32 *covered = bpf_map_lookup_elem(&rf_cgroups, &key);

	return covered && !*covered;
}

/* Whether somebody listens whom the scope covers. A port shared by several cgroups, or by an unknown one, counts as covered. */
static __always_inline int is_covered_port(__u64 netns, const struct scope *s, const struct port *p)
{
	if (!p || !p->listeners)
		return 0;
	return !(s->flags & RF_HOST) || !p->cgroup || p->cgroup == RF_MIXED || !is_excepted(netns, p->cgroup);
}

static __always_inline int is_covered(__u64 netns, const struct scope *s, __u32 port)
{
	struct port_key key = { .netns = netns, .port = port };
	__u32 zero = 0, *full;

	if (is_covered_port(netns, s, bpf_map_lookup_elem(&rf_ports, &key)))
		return 1;
	key.seeded = 1;
	if (is_covered_port(netns, s, bpf_map_lookup_elem(&rf_ports, &key)))
		return 1;
	full = bpf_map_lookup_elem(&rf_overflow, &zero);
	return full && *full;
}

static __always_inline struct agent *the_agent(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&rf_agent, &zero);
}

/* A stopped agent keeps its listeners: only the heartbeat tells. Signed, because the clock of this helper may
 * be a moment behind the agent's while the kernel adjusts time. */
static __always_inline int beating(const struct agent *a)
{
	return (__s64)(bpf_ktime_get_ns() - a->heartbeat) < (__s64)a->limit;
}

#endif
