/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/* Tests and moves of 16-byte addresses. */
#ifndef RINGFENCE_ADDR_H
#define RINGFENCE_ADDR_H

#include "maps.h"
#include <bpf/bpf_endian.h>

#define AF_INET 2
#define AF_INET6 10
#define MAPPED bpf_htonl(0xffff)

/* Reads a 32-bit field of the context or of a socket. The verifier takes such a read only at a constant
 * offset, and the compiler, volatile or not, joins the reads of two branches into one at a computed offset. */
#define CTX(base, field)                                                                           \
	({                                                                                         \
		__u32 v_;                                                                          \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                              \
			     : "=r"(v_)                                                            \
			     : "r"(base), "i"(__builtin_offsetof(typeof(*(base)), field)));        \
		v_;                                                                                \
	})

static __always_inline void set_addr(__be32 *to, __be32 a, __be32 b, __be32 c, __be32 d)
{
	to[0] = a;
	to[1] = b;
	to[2] = c;
	to[3] = d;
}

static __always_inline void copy_addr(__be32 *to, const __be32 *from)
{
	set_addr(to, from[0], from[1], from[2], from[3]);
}

static __always_inline void set_v4(__be32 *to, __be32 a)
{
	set_addr(to, 0, 0, MAPPED, a);
}

static __always_inline int is_mapped(const __be32 *a)
{
	return !a[0] && !a[1] && a[2] == MAPPED;
}

static __always_inline int is_zero(const __be32 *a)
{
	return !(a[0] | a[1] | a[2] | a[3]);
}

static __always_inline int same_addr(const __be32 *a, const __be32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

/* 0.0.0.0, :: or ::ffff:0.0.0.0. */
static __always_inline int is_any(const __be32 *a)
{
	return is_zero(a) || (is_mapped(a) && !a[3]);
}

/* 127.0.0.0/8 or ::1. */
static __always_inline int is_loopback(const __be32 *a)
{
	if (is_mapped(a))
		return (a[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a[0] && !a[1] && !a[2] && a[3] == bpf_htonl(1);
}

/* fe80::/10, whose interface the connect context does not carry. */
static __always_inline int is_link_local(const __be32 *a)
{
	return (a[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* 224.0.0.0/3 (multicast, reserved, broadcast) or ff00::/8: TCP cannot go there, and the kernel says so itself. */
static __always_inline int is_group(const __be32 *a)
{
	if (is_mapped(a))
		return (a[3] & bpf_htonl(0xe0000000)) == bpf_htonl(0xe0000000);
	return (a[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

static __always_inline int is_own_port(__u32 port)
{
	return port == RF_OUTBOUND_PORT || port == RF_INBOUND_PORT || port == RF_TUNNEL_PORT;
}

static __always_inline struct route *route_to(__u64 netns, const __be32 *dst)
{
	struct route_key key = {
		.prefixlen = 64 + 128,
		.netns_hi = netns >> 32,
		.netns_lo = netns,
	};

	copy_addr(key.dst, dst);
	return bpf_map_lookup_elem(&rf_routes, &key);
}

#endif
