/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * The connect hooks: note where a workload wants to go and who it is, and
 * point its socket at the agent's listener in the same namespace.
 *
 * In an enforcing scope whatever goes wrong refuses the call; elsewhere it
 * leaves the call alone. Either way a counter says so.
 */
#ifndef RINGFENCE_CONNECT_H
#define RINGFENCE_CONNECT_H

#include "caller.h"

#define SOCK_STREAM 1
#define TCP 6
#define TCP_LISTENING 10
#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25
#define ENETUNREACH 101
#define ECONNREFUSED 111
#define PASS 1

/* Errors of the hooks are read by the caller of connect(2), who knows ECONNREFUSED and does not expect EPERM. */
static __always_inline int fail(int error)
{
	if (rf_retval)
		bpf_set_retval(-error);
	return 0;
}

static __always_inline void tell(__u64 netns, __u32 kind, __u32 reason, const struct note *n,
				 const __be32 *src, __u32 sport, __u32 bypass)
{
	struct event *e = new_event(netns, kind, reason);

	if (!e)
		return;
	e->note = *n;
	e->bypass = bypass;
	e->sport = bpf_htons(sport);
	copy_addr(e->src, src);
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	bpf_ringbuf_submit(e, 0);
}

/* Whether the agent would get the connection: it beats, and its listener is there. The listener is asked for
 * itself, since the kernel frees the port the moment the agent dies, and the heartbeat takes its time. */
static __always_inline int agent_listens(void *ctx, const struct agent *a, int v6)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	int listening;

	if (!beating(a))
		return 0;
	if (v6) {
		tuple.ipv6.saddr[3] = tuple.ipv6.daddr[3] = bpf_htonl(1);
		tuple.ipv6.dport = bpf_htons(RF_OUTBOUND_PORT);
		sk = bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv4.saddr = tuple.ipv4.daddr = bpf_htonl(0x7f000001);
		tuple.ipv4.dport = bpf_htons(RF_OUTBOUND_PORT);
		sk = bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	listening = sk->state == TCP_LISTENING;
	bpf_sk_release(sk);
	return listening;
}

/* Both the maker of the socket and its user must be excepted, so that neither joining an excepted cgroup
 * nor handing a socket around gets out of the scope. */
static __always_inline int is_left_out(__u64 netns, const struct scope *s, const struct note *n,
				       const struct sock_state *st)
{
	if (!(s->flags & RF_HOST) || !is_excepted(netns, n->cgroup))
		return 0;
	return !st || !st->creator || st->creator == n->cgroup || is_excepted(netns, st->creator);
}

static __always_inline int holds(const struct deny *d, const struct agent *a)
{
	return d && d->generation == a->generation && d->until > bpf_ktime_get_ns();
}

/* Whether policy has already refused this caller, by its process image or by its whole cgroup. */
static __always_inline int is_denied(__u64 netns, const struct agent *a, const struct note *n)
{
	struct deny_key key = {
		.netns = netns,
		.cgroup = n->cgroup,
		.dport = n->dport,
		.uid = n->uid,
		.gid = n->gid,
	};

	copy_addr(key.dst, n->dst);
	if (holds(bpf_map_lookup_elem(&rf_denies, &key), a))
		return 1;
	if (!n->start)
		return 0; /* without start time a pid may be another's */
	key.tgid = n->tgid;
	key.start = n->start;
	key.exec_id = n->exec_id;
	return holds(bpf_map_lookup_elem(&rf_denies, &key), a);
}

/* What getsockname shows: the address the connection would have had without us. */
static __always_inline void own_address(__be32 *self, const struct scope *s, const struct route *r,
					const struct note *n, int local)
{
	if (!is_zero(n->bound) || (local && is_loopback(n->dst)))
		return; /* the kernel's own answer is right */
	if (local)
		copy_addr(self, n->dst);
	else if (r && !is_zero(r->source))
		copy_addr(self, r->source);
	else if (is_mapped(n->dst))
		copy_addr(self, s->source4);
	else
		copy_addr(self, s->source6);
}

/* File what is known with the socket; rf_flows files it under the 4-tuple once the source port is chosen. */
static __always_inline int keep(struct bpf_sock *sk, const struct scope *s, const struct route *r,
				const struct note *n, int local)
{
	struct sock_state *st = bpf_sk_storage_get(&rf_socks, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!st)
		return 0;
	st->kind = RF_SOCK_CAPTURED;
	st->note = *n;
	own_address(st->note.self, s, r, n, local);
	return 1;
}

/* A socket bound to a device cannot reach loopback: its SYN would be lost. The device goes into the note, and
 * the agent's own dial is bound to it. */
static __always_inline int free_of_device(struct bpf_sock_addr *ctx, struct note *n)
{
	char none[4] = {};

	n->device = ctx->sk->bound_dev_if;
	if (!n->device || n->device == 1)
		return 1; /* 1 is lo in every namespace */
	return !bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, none, sizeof(none));
}

/* Reads what the workload dialled; the unspecified address means this host, as in tcp_v4_connect. */
static __always_inline void destination(struct bpf_sock_addr *ctx, struct note *n, const __be32 *src, int v6)
{
	n->dport = ctx->user_port;
	if (!v6)
		set_v4(n->dst, CTX(ctx, user_ip4));
	else
		set_addr(n->dst, CTX(ctx, user_ip6[0]), CTX(ctx, user_ip6[1]), CTX(ctx, user_ip6[2]), CTX(ctx, user_ip6[3]));
	if (!is_any(n->dst))
		return;
	if (is_mapped(n->dst) || (v6 && is_mapped(src)))
		set_v4(n->dst, bpf_htonl(0x7f000001));
	else
		set_addr(n->dst, 0, 0, 0, bpf_htonl(1));
}

static __always_inline void redirect(struct bpf_sock_addr *ctx, int v6, int mapped)
{
	if (!v6) {
		ctx->user_ip4 = bpf_htonl(0x7f000001);
	} else {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = mapped ? MAPPED : 0;
		ctx->user_ip6[3] = mapped ? bpf_htonl(0x7f000001) : bpf_htonl(1);
	}
	ctx->user_port = bpf_htons(RF_OUTBOUND_PORT);
}

/* Connections that no mode touches: what they are, or RF_CAPTURED for none of it. */
static __always_inline __u32 untouchable(const struct scope *s, struct bpf_sock *sk, const struct note *n,
					 const struct sock_state *st, __u64 netns)
{
	__u32 port = sk->src_port;

	if (is_kernel_socket(sk))
		return RF_KERNEL_SOCKET;
	if (is_left_out(netns, s, n, st))
		return RF_EXCEPTED;
	/* Without BTF a privileged source port is the only sign of a kernel socket. */
	if (port && port < 1024 && (s->mode != RF_ENFORCE || !rf_btf))
		return RF_PRIVILEGED_PORT;
	/* In dry-run nothing may change for a program. A mark chooses a route, and the agent's dial has none; the
	 * subflow that connect shows us is not the socket that is later asked for its names. */
	if (s->mode == RF_DRY_RUN && sk->mark)
		return RF_MARKED;
	if (s->mode == RF_DRY_RUN && is_multipath(sk))
		return RF_MULTIPATH;
	if (is_link_local(n->dst))
		return RF_LINK_LOCAL;
	if (is_group(n->dst))
		return RF_GROUP_ADDRESS;
	return RF_CAPTURED;
}

static __always_inline int on_connect(struct bpf_sock_addr *ctx, int v6)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct scope *s = scope_of(netns);
	struct bpf_sock *sk = ctx->sk;
	struct agent *a = the_agent();
	struct sock_state *st;
	struct note n = {};
	__be32 src[4] = {};
	struct route *r;
	__u32 why, sport;
	int local, enforce;

	if (!s || !a || !sk || ctx->type != SOCK_STREAM || ctx->protocol != TCP)
		return PASS;
	if (bpf_get_current_cgroup_id() == a->cgroup)
		return PASS;
	enforce = s->mode == RF_ENFORCE;

	if (v6)
		set_addr(src, CTX(sk, src_ip6[0]), CTX(sk, src_ip6[1]), CTX(sk, src_ip6[2]), CTX(sk, src_ip6[3]));
	else if (CTX(sk, src_ip4))
		set_v4(src, CTX(sk, src_ip4));
	sport = sk->src_port;
	if (!is_any(src))
		copy_addr(n.bound, src);
	destination(ctx, &n, src, v6);
	note_caller(&n);

	/* A socket may be connected more than once, and not each time through us. */
	st = bpf_sk_storage_get(&rf_socks, sk, 0, 0);
	if (st)
		st->kind = RF_SOCK_PLAIN;

	why = untouchable(s, sk, &n, st, netns);
	if (s->mode == RF_WATCH && why == RF_CAPTURED) {
		count(RF_WATCHED);
		tell(netns, RF_EV_CONNECTED, RF_WATCHED, &n, src, sport, 0);
		return PASS;
	}
	if (why != RF_CAPTURED) {
		count(why);
		if (why != RF_GROUP_ADDRESS)
			tell(netns, RF_EV_CONNECTED, why, &n, src, sport, 1);
		return PASS;
	}

	r = route_to(netns, n.dst);
	local = is_loopback(n.dst) || (r && r->kind == RF_ROUTE_LOCAL);
	if (local && is_own_port(bpf_ntohs(n.dport))) {
		count(RF_OWN_PORT); /* arrives without a note, and is reset */
		return PASS;
	}
	if (local && !(s->flags & RF_LOOP_ENFORCE)) {
		count(RF_LOOPBACK);
		if (s->flags & RF_LOOP_OBSERVE)
			tell(netns, RF_EV_CONNECTED, RF_LOOPBACK, &n, src, sport, 0);
		return PASS;
	}
	if (r && r->kind == RF_ROUTE_BROADCAST) {
		count(RF_GROUP_ADDRESS);
		return PASS;
	}
	if (!local && (r ? r->kind == RF_ROUTE_ERROR : !(s->flags & RF_ROUTES_UNKNOWN))) {
		/* The kernel's own error shall stand. An enforcing scope says it for the kernel, because
		 * a route may have come this moment, and passing would let the connection out. */
		count(RF_NO_ROUTE);
		tell(netns, enforce ? RF_EV_REFUSED : RF_EV_CONNECTED, RF_NO_ROUTE, &n, src, sport, !enforce);
		return enforce ? fail(r && r->error ? r->error : ENETUNREACH) : PASS;
	}
	if (!agent_listens(ctx, a, v6 && !is_mapped(n.dst))) {
		int refuse = enforce && !(s->flags & RF_DOWN_OPEN);

		count(RF_AGENT_DOWN);
		tell(netns, refuse ? RF_EV_REFUSED : RF_EV_CONNECTED, RF_AGENT_DOWN, &n, src, sport, !refuse);
		return refuse ? fail(ECONNREFUSED) : PASS;
	}
	if (enforce && is_denied(netns, a, &n)) {
		count(RF_DENIED);
		tell(netns, RF_EV_REFUSED, RF_DENIED, &n, src, sport, 0);
		return fail(ECONNREFUSED);
	}
	if (!free_of_device(ctx, &n)) {
		count(RF_DEVICE);
		tell(netns, enforce ? RF_EV_REFUSED : RF_EV_CONNECTED, RF_DEVICE, &n, src, sport, !enforce);
		return enforce ? fail(ECONNREFUSED) : PASS;
	}
	if (!keep(sk, s, r, &n, local)) {
		count(RF_NO_MEMORY);
		return enforce ? fail(ECONNREFUSED) : PASS;
	}
	count(RF_CAPTURED);
	redirect(ctx, v6, is_mapped(n.dst));
	return PASS;
}

#endif
