//go:build ignore

/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * The capture programs of one agent instance. All but rf_steer are attached
 * once, at the root of the cgroup v2 tree, beside whatever else is there; they
 * leave every socket alone whose network namespace is not in rf_scopes.
 */
#include "connect.h"
#include "flows.h"
#include "guard.h"
#include "names.h"
#include "steer.h"

/* Types that no map names, kept for the Go side. */
const struct event *rf_type_event __attribute__((unused));
const enum rf_reason *rf_type_reason __attribute__((unused));
const enum rf_event_kind *rf_type_event_kind __attribute__((unused));
const enum rf_sock_kind *rf_type_sock_kind __attribute__((unused));
const enum rf_route_kind *rf_type_route_kind __attribute__((unused));
const enum rf_scope_flag *rf_type_scope_flag __attribute__((unused));

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("cgroup/connect4")
int rf_connect4(struct bpf_sock_addr *ctx)
{
	return on_connect(ctx, 0);
}

SEC("cgroup/connect6")
int rf_connect6(struct bpf_sock_addr *ctx)
{
	return on_connect(ctx, 1);
}

SEC("cgroup/getpeername4")
int rf_peername4(struct bpf_sock_addr *ctx)
{
	return on_getpeername(ctx, 0);
}

SEC("cgroup/getpeername6")
int rf_peername6(struct bpf_sock_addr *ctx)
{
	return on_getpeername(ctx, 1);
}

SEC("cgroup/getsockname4")
int rf_sockname4(struct bpf_sock_addr *ctx)
{
	return on_getsockname(ctx, 0);
}

SEC("cgroup/getsockname6")
int rf_sockname6(struct bpf_sock_addr *ctx)
{
	return on_getsockname(ctx, 1);
}

SEC("cgroup/sock_create")
int rf_sock_create(struct bpf_sock *ctx)
{
	return on_create(ctx);
}

SEC("cgroup/bind4")
int rf_bind4(struct bpf_sock_addr *ctx)
{
	return on_bind(ctx);
}

SEC("cgroup/bind6")
int rf_bind6(struct bpf_sock_addr *ctx)
{
	return on_bind(ctx);
}

/* The port of a bind to port 0 is known only now. */
SEC("cgroup/post_bind4")
int rf_bound4(struct bpf_sock *ctx)
{
	return ctx->protocol != TCP || !takes_own_port(bpf_get_netns_cookie(ctx), ctx->src_port);
}

SEC("cgroup/post_bind6")
int rf_bound6(struct bpf_sock *ctx)
{
	return ctx->protocol != TCP || !takes_own_port(bpf_get_netns_cookie(ctx), ctx->src_port);
}

SEC("sockops")
int rf_flows(struct bpf_sock_ops *ctx)
{
	return on_sockops(ctx);
}

SEC("raw_tp/sched_process_exec")
int rf_exec(struct bpf_raw_tracepoint_args *ctx)
{
	on_exec((struct task_struct *)ctx->args[0], 0);
	return 0;
}

/* Linux 6.10, before the point of no return: /proc shows the new executable only after this, but before
 * sched_process_exec. */
SEC("raw_tp/sched_prepare_exec")
int rf_exec_soon(struct bpf_raw_tracepoint_args *ctx)
{
	on_exec((struct task_struct *)ctx->args[0], 1);
	return 0;
}

SEC("sk_lookup")
int rf_steer(struct bpf_sk_lookup *ctx)
{
	return on_lookup(ctx);
}
