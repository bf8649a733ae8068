/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/* sk_lookup: new inbound connections of a scope go to the agent's inbound listener. Each namespace has its own copy of the program. */
#ifndef RINGFENCE_STEER_H
#define RINGFENCE_STEER_H

#include "addr.h"

struct lookup {
	struct conn_key key; /* as the client dialled */
	__u32 port;	     /* dialled, host byte order */
};

static __always_inline void read_lookup(struct bpf_sk_lookup *ctx, struct lookup *l)
{
	l->key.netns = rf_netns;
	if (ctx->family == AF_INET) {
		set_v4(l->key.src, CTX(ctx, remote_ip4));
		set_v4(l->key.dst, CTX(ctx, local_ip4));
	} else {
		set_addr(l->key.src, CTX(ctx, remote_ip6[0]), CTX(ctx, remote_ip6[1]), CTX(ctx, remote_ip6[2]), CTX(ctx, remote_ip6[3]));
		set_addr(l->key.dst, CTX(ctx, local_ip6[0]), CTX(ctx, local_ip6[1]), CTX(ctx, local_ip6[2]), CTX(ctx, local_ip6[3]));
	}
	l->port = ctx->local_port;
	l->key.sport = ctx->remote_port;
	l->key.dport = bpf_htons(l->port);
}

/* Whether the SYN was sent in this namespace. The ingress interface does not tell: for an address of eth0 that
 * is dialled from the same host the kernel shows eth0 here, though the packet came by lo. The source address
 * does: from outside, IPv4 packets with a source of our own are dropped (fib_validate_source), and an IPv6
 * sender who forges one never sees the SYN-ACK, which goes to ourselves. */
static __always_inline int from_here(const struct lookup *l)
{
	struct route *r;

	if (is_loopback(l->key.src) || same_addr(l->key.src, l->key.dst))
		return 1;
	r = route_to(rf_netns, l->key.src);
	return r && r->kind == RF_ROUTE_LOCAL;
}

/* Hands the connection to the agent. An enforcing scope refuses it when that fails: the client gets a RST. */
static __always_inline int hand_over(struct bpf_sk_lookup *ctx, const struct scope *s)
{
	struct listener_key key = { .netns = rf_netns, .family = ctx->family };
	struct agent *a = the_agent();
	struct bpf_sock *sk;
	long err = -1;

	if (a && beating(a)) {
		sk = bpf_map_lookup_elem(&rf_listeners, &key);
		if (sk) {
			err = bpf_sk_assign(ctx, sk, 0);
			bpf_sk_release(sk);
		}
	}
	if (!err) {
		count(RF_STEERED);
		return SK_PASS;
	}
	if (s->mode == RF_ENFORCE && !(s->flags & RF_DOWN_OPEN)) {
		count(RF_STEER_REFUSED);
		return SK_DROP;
	}
	count(RF_STEER_PASSED);
	return SK_PASS;
}

static __always_inline int on_lookup(struct bpf_sk_lookup *ctx)
{
	__u64 netns = rf_netns;
	struct scope *s = scope_of(netns);
	struct lookup l = {};

	if (!s || s->mode == RF_WATCH || ctx->protocol != 6)
		return SK_PASS;
	read_lookup(ctx, &l);
	if (is_own_port(l.port))
		return SK_PASS;
	if (from_here(&l)) {
		if (bpf_map_lookup_elem(&rf_exempt, &l.key))
			return SK_PASS;
		/* With loopback enforced, what connect has redirected does not come here: what comes was not, and
		 * reaches the agent as a client that nobody vouches for. */
		if (!(s->flags & RF_LOOP_ENFORCE))
			return SK_PASS;
	}
	if (!is_covered(netns, s, l.port))
		return SK_PASS;
	return hand_over(ctx, s);
}

#endif
