/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/* Making and binding sockets: what would slip past the connect hooks is refused, and the agent's ports stay the agent's. */
#ifndef RINGFENCE_GUARD_H
#define RINGFENCE_GUARD_H

#include "connect.h"

#define SOCK_DGRAM 2
#define MPTCP 262
#define EADDRINUSE 98
#define EPROTONOSUPPORT 93

/* Sockets whose traffic the hooks see, or that carry no connection: TCP; UDP and the two echo protocols of
 * unprivileged ping. UDP-Lite, SCTP, DCCP, L2TP and raw sockets have no connect hook at all. MPTCP is refused
 * because its later subflows and its getpeername bypass the socket that connect saw; callers fall back to TCP. */
static __always_inline int is_seen(__u32 type, __u32 protocol)
{
	if (type == SOCK_STREAM)
		return protocol == 0 || protocol == TCP;
	if (type == SOCK_DGRAM)
		return protocol == 0 || protocol == 17 || protocol == 1 || protocol == 58;
	return 0;
}

static __always_inline int on_create(struct bpf_sock *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct scope *s = scope_of(netns);
	struct agent *a = the_agent();
	struct sock_state *st;
	struct note n = {};
	struct event *e;

	if (!s || !a || bpf_get_current_cgroup_id() == a->cgroup)
		return 1;
	/* In watch too: a listener outlives a change of mode. */
	if ((s->flags & RF_HOST) && ctx->type == SOCK_STREAM) {
		st = bpf_sk_storage_get(&rf_socks, ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (st)
			st->creator = bpf_get_current_cgroup_id();
	}
	if (is_seen(ctx->type, ctx->protocol) || s->mode != RF_ENFORCE)
		return 1;
	if ((s->flags & RF_HOST) && is_excepted(netns, bpf_get_current_cgroup_id()))
		return 1;
	count(RF_PROTOCOL);
	note_caller(&n);
	e = new_event(netns, RF_EV_BYPASS, RF_PROTOCOL);
	if (e) {
		e->note = n;
		e->protocol = ctx->protocol;
		bpf_get_current_comm(e->comm, sizeof(e->comm));
		bpf_ringbuf_submit(e, 0);
	}
	return ctx->protocol == MPTCP ? fail(EPROTONOSUPPORT) : 0;
}

/* Whether somebody else binds a port of the agent in a scope where the agent listens. */
static __always_inline int takes_own_port(__u64 netns, __u32 port)
{
	struct scope *s = scope_of(netns);
	struct agent *a = the_agent();
	struct event *e;

	if (!s || !a || s->mode == RF_WATCH || !is_own_port(port))
		return 0;
	if (bpf_get_current_cgroup_id() == a->cgroup)
		return 0;
	count(RF_PORT_RESERVED);
	e = new_event(netns, RF_EV_BYPASS, RF_PORT_RESERVED);
	if (e) {
		note_caller(&e->note);
		e->sport = bpf_htons(port);
		bpf_get_current_comm(e->comm, sizeof(e->comm));
		bpf_ringbuf_submit(e, 0);
	}
	return 1;
}

static __always_inline int on_bind(struct bpf_sock_addr *ctx)
{
	__u16 port = bpf_ntohs(ctx->user_port);

	if (ctx->type != SOCK_STREAM || !takes_own_port(bpf_get_netns_cookie(ctx), port))
		return 1;
	return fail(EADDRINUSE);
}

#endif
