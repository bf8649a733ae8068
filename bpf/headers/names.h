/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/* getpeername and getsockname: a workload sees the connection it believes to have. accept4 asks the first of them too. */
#ifndef RINGFENCE_NAMES_H
#define RINGFENCE_NAMES_H

#include "addr.h"

static __always_inline void answer(struct bpf_sock_addr *ctx, const __be32 *a, int v6)
{
	if (!v6) {
		ctx->user_ip4 = a[3];
		return;
	}
	ctx->user_ip6[0] = a[0];
	ctx->user_ip6[1] = a[1];
	ctx->user_ip6[2] = a[2];
	ctx->user_ip6[3] = a[3];
}

static __always_inline int on_getpeername(struct bpf_sock_addr *ctx, int v6)
{
	struct sock_state *st;

	if (!ctx->sk)
		return 1;
	st = bpf_sk_storage_get(&rf_socks, ctx->sk, 0, 0);
	if (!st || (st->kind != RF_SOCK_CAPTURED && st->kind != RF_SOCK_SERVED))
		return 1;
	if (!v6 && !is_mapped(st->note.dst))
		return 1; /* an IPv4 socket cannot show an IPv6 client */
	answer(ctx, st->note.dst, v6);
	ctx->user_port = st->note.dport;
	return 1;
}

static __always_inline int on_getsockname(struct bpf_sock_addr *ctx, int v6)
{
	struct sock_state *st;

	if (!ctx->sk)
		return 1;
	st = bpf_sk_storage_get(&rf_socks, ctx->sk, 0, 0);
	if (!st || st->kind != RF_SOCK_CAPTURED || is_any(st->note.self) || (!v6 && !is_mapped(st->note.self)))
		return 1;
	answer(ctx, st->note.self, v6);
	return 1;
}

#endif
