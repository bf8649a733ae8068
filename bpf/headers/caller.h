/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/* Who is calling, and telling the agent about it. Only for programs that run in the caller's own context. */
#ifndef RINGFENCE_CALLER_H
#define RINGFENCE_CALLER_H

#include "addr.h"
#include "kernel.h"
#include <bpf/bpf_core_read.h>

/* Fills what note says of the caller. The caller's image is its thread group with start time and exec count:
 * a pid alone may be somebody else's by the time it is looked up. */
static __always_inline void note_caller(struct note *n)
{
	__u64 ids = bpf_get_current_uid_gid();

	n->tgid = bpf_get_current_pid_tgid() >> 32;
	n->uid = ids;
	n->gid = ids >> 32;
	n->cgroup = bpf_get_current_cgroup_id();
	if (rf_btf) {
		struct task_struct *task = (void *)bpf_get_current_task();

		n->start = BPF_CORE_READ(task, group_leader, start_boottime);
		n->exec_id = BPF_CORE_READ(task, group_leader, self_exec_id);
	}
}

/* The thread group becomes another image: its exec id is to be at least what it was plus ahead. */
static __always_inline void on_exec(struct task_struct *task, __u64 ahead)
{
	struct image_key key = {};
	__u64 id;

	if (!rf_btf)
		return;
	key.tgid = bpf_get_current_pid_tgid() >> 32;
	key.start = BPF_CORE_READ(task, group_leader, start_boottime);
	id = BPF_CORE_READ(task, group_leader, self_exec_id) + ahead;
	bpf_map_update_elem(&rf_execs, &key, &id, BPF_ANY);
}

/* Whether a socket is a subflow of Multipath TCP. The socket that the program holds is another one then. */
static __always_inline int is_multipath(struct bpf_sock *sk)
{
	struct tcp_sock *tp;
	bool mptcp = false;

	if (!rf_btf)
		return 0;
	tp = (void *)bpf_skc_to_tcp_sock(sk);
	if (tp && bpf_core_field_exists(tp->is_mptcp))
		bpf_core_read(&mptcp, sizeof(mptcp), &tp->is_mptcp);
	return mptcp;
}

/* A socket that the kernel opened for itself: NFS, iSCSI, a file system. Never refused nor redirected, since
 * their reconnects remember a rewritten address and spin on an error. An MPTCP subflow is a kernel socket in
 * form only: a process asked for it. */
static __always_inline int is_kernel_socket(struct bpf_sock *sk)
{
	struct tcp_sock *tp;

	if (!rf_btf)
		return 0;
	tp = (void *)bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	if (is_multipath(sk))
		return 0;
	return BPF_CORE_READ_BITFIELD_PROBED((struct sock *)tp, sk_kern_sock);
}

static __always_inline struct event *new_event(__u64 netns, __u32 kind, __u32 reason)
{
	struct event *e = bpf_ringbuf_reserve(&rf_events, sizeof(*e), 0);

	if (!e) {
		count(RF_EVENT_LOST);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->netns = netns;
	e->time = bpf_ktime_get_ns();
	e->kind = kind;
	e->reason = reason;
	e->protocol = 6;
	return e;
}

#endif
