/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * The life of TCP sockets. connect: source port chosen, SYN not sent, so a note
 * filed here is there before anybody can accept, TCP fast open included.
 */
#ifndef RINGFENCE_FLOWS_H
#define RINGFENCE_FLOWS_H

#include "caller.h"

#define TCP_STATE_CLOSE 7
#define TCP_STATE_LISTEN 10

static __always_inline void local_addr(struct bpf_sock_ops *ops, __be32 *to)
{
	if (ops->family == AF_INET)
		set_v4(to, CTX(ops, local_ip4));
	else
		set_addr(to, CTX(ops, local_ip6[0]), CTX(ops, local_ip6[1]), CTX(ops, local_ip6[2]), CTX(ops, local_ip6[3]));
}

static __always_inline void remote_addr(struct bpf_sock_ops *ops, __be32 *to)
{
	if (ops->family == AF_INET)
		set_v4(to, CTX(ops, remote_ip4));
	else
		set_addr(to, CTX(ops, remote_ip6[0]), CTX(ops, remote_ip6[1]), CTX(ops, remote_ip6[2]), CTX(ops, remote_ip6[3]));
}

/* local_port is in host byte order, remote_port in network byte order in the upper half. */
static __always_inline __be16 local_port(struct bpf_sock_ops *ops)
{
	return bpf_htons(ops->local_port);
}

static __always_inline __be16 remote_port(struct bpf_sock_ops *ops)
{
	return bpf_htons(bpf_ntohl(ops->remote_port));
}

/* The connection as this socket's side dialled it. */
static __always_inline void dialled(struct bpf_sock_ops *ops, struct conn_key *key)
{
	local_addr(ops, key->src);
	remote_addr(ops, key->dst);
	key->sport = local_port(ops);
	key->dport = remote_port(ops);
}

/* The connection as the other side dialled it. */
static __always_inline void accepted(struct bpf_sock_ops *ops, struct conn_key *key)
{
	remote_addr(ops, key->src);
	local_addr(ops, key->dst);
	key->sport = remote_port(ops);
	key->dport = local_port(ops);
}

static __always_inline void on_dial(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	struct sock_state *st = bpf_sk_storage_get(&rf_socks, sk, 0, 0);
	struct conn_key key = {};

	if (!st)
		return;
	if (st->kind != RF_SOCK_CAPTURED && st->kind != RF_SOCK_AGENT)
		return;
	key.netns = bpf_get_netns_cookie(ops);
	dialled(ops, &key);
	if (st->kind == RF_SOCK_CAPTURED) {
		/* Not filed means no note, and the agent resets the connection. */
		if (bpf_map_update_elem(&rf_notes, &key, &st->note, BPF_ANY))
			count(RF_NO_NOTE);
		return;
	}
	struct exemption x = { .port = st->note.dport };

	copy_addr(x.client, st->note.dst);
	if (bpf_map_update_elem(&rf_exempt, &key, &x, BPF_ANY))
		count(RF_EXEMPT_FULL);
	/* A dial that fails, or whose answer never comes, must not leave its exemption behind. */
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* The workload's side of a connection is there: from here on the socket itself knows whom it serves, and
 * sk_lookup is not asked again, so the exemption has done its duty. */
static __always_inline void on_accept(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	struct conn_key key = { .netns = bpf_get_netns_cookie(ops) };
	struct scope *s = scope_of(key.netns);
	struct sock_state *st;
	struct exemption *x;
	struct event *e;

	if (!s || is_own_port(ops->local_port) || bpf_sk_storage_get(&rf_own, sk, 0, 0))
		return;
	accepted(ops, &key);
	x = bpf_map_lookup_elem(&rf_exempt, &key);
	if (x) {
		if (x->port) {
			st = bpf_sk_storage_get(&rf_socks, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
			if (st) {
				st->kind = RF_SOCK_SERVED;
				copy_addr(st->note.dst, x->client);
				st->note.dport = x->port;
			}
		}
		bpf_map_delete_elem(&rf_exempt, &key);
		return;
	}
	/* Nobody but the client vouches for this one. Watching, or loopback left alone, that is as it should be;
	 * otherwise it came before its port was known, and the agent may cut it. */
	int local = is_loopback(key.src) || same_addr(key.src, key.dst);

	if (s->mode != RF_WATCH && local && !(s->flags & RF_LOOP_ENFORCE))
		return;
	if (s->mode != RF_WATCH && !is_covered(key.netns, s, ops->local_port))
		return;
	if (s->mode != RF_WATCH)
		count(RF_UNSTEERED);
	e = new_event(key.netns, RF_EV_ACCEPTED, s->mode == RF_WATCH ? RF_WATCHED : RF_UNSTEERED);
	if (!e)
		return;
	e->bypass = s->mode != RF_WATCH;
	copy_addr(e->src, key.src);
	e->sport = key.sport;
	copy_addr(e->note.dst, key.dst);
	e->note.dport = key.dport;
	bpf_ringbuf_submit(e, 0);
}

static __always_inline void port_event(struct bpf_sock_ops *ops, __u64 netns, __u32 kind)
{
	struct event *e = new_event(netns, kind, RF_WATCHED);

	if (!e)
		return;
	local_addr(ops, e->note.dst);
	e->note.dport = local_port(ops);
	bpf_ringbuf_submit(e, 0);
}

static __always_inline void overflow(void)
{
	__u32 zero = 0, one = 1;

	count(RF_PORTS_FULL);
	bpf_map_update_elem(&rf_overflow, &zero, &one, BPF_ANY);
}

/* Whose the port is. Counted before it is read, so that of two listeners who come at once one sees the other. */
static __always_inline void note_owner(struct port *p, __u64 cgroup)
{
	if (p->listeners <= 1)
		p->cgroup = cgroup;
	else if (p->cgroup != cgroup)
		p->cgroup = RF_MIXED;
}

static __always_inline void listeners_changed(void)
{
	__u32 zero = 0;
	__u64 *n = bpf_map_lookup_elem(&rf_listens, &zero);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* A count, not a flag, since several sockets may listen on one port; and no deletion at zero, since the next
 * listener may be counted at this moment. */
static __always_inline void on_listen(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	struct port_key key = { .netns = bpf_get_netns_cookie(ops), .port = ops->local_port };
	struct sock_state *st;
	struct port fresh = {}, *p;

	if (!scope_of(key.netns) || is_own_port(key.port) || is_kernel_socket(sk))
		return;
	st = bpf_sk_storage_get(&rf_socks, sk, 0, 0);
	p = bpf_map_lookup_elem(&rf_ports, &key);
	if (!p) {
		bpf_map_update_elem(&rf_ports, &key, &fresh, BPF_NOEXIST);
		p = bpf_map_lookup_elem(&rf_ports, &key);
	}
	if (p) {
		__sync_fetch_and_add(&p->listeners, 1);
		note_owner(p, st ? st->creator : 0);
	} else {
		overflow();
	}
	listeners_changed();
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	port_event(ops, key.netns, RF_EV_LISTENING);
}

static __always_inline void on_unlisten(struct bpf_sock_ops *ops)
{
	struct port_key key = { .netns = bpf_get_netns_cookie(ops), .port = ops->local_port };
	struct port *p = bpf_map_lookup_elem(&rf_ports, &key);

	if (p && p->listeners)
		__sync_fetch_and_add(&p->listeners, -1);
	listeners_changed();
	if (scope_of(key.netns))
		port_event(ops, key.netns, RF_EV_CLOSED);
}

static __always_inline void on_state(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	struct conn_key key = {};
	struct sock_state *st;

	if (ops->args[1] != TCP_STATE_CLOSE)
		return;
	if (ops->args[0] == TCP_STATE_LISTEN) {
		on_unlisten(ops);
		return;
	}
	st = bpf_sk_storage_get(&rf_socks, sk, 0, 0);
	if (!st || st->kind != RF_SOCK_AGENT)
		return;
	key.netns = bpf_get_netns_cookie(ops);
	dialled(ops, &key);
	bpf_map_delete_elem(&rf_exempt, &key);
}

static __always_inline int on_sockops(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;

	if (!sk || (ops->family != AF_INET && ops->family != AF_INET6))
		return 1;
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_dial(ops, sk);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_accept(ops, sk);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		on_listen(ops, sk);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		on_state(ops, sk);
		break;
	}
	return 1;
}

#endif
