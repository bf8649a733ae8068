/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * What the kernel side and the agent tell each other. Fixed widths, explicit
 * padding written as zero (map keys are compared byte by byte), byte order in
 * the type. An address is always 16 bytes: IPv4 is mapped, RFC 4291 section
 * 2.5.5.2. Whoever changes a layout changes the tag that the loader computes
 * from the maps, so an agent never shares a table with a stranger's layout.
 */
#ifndef RINGFENCE_H
#define RINGFENCE_H

#include <linux/bpf.h>
#include <linux/types.h>

#define RF_OUTBOUND_PORT 15001
#define RF_INBOUND_PORT 15006
#define RF_TUNNEL_PORT 15008

enum rf_mode {
	RF_WATCH = 0,
	RF_DRY_RUN = 1,
	RF_ENFORCE = 2,
};

/* Flags of a scope. */
enum rf_scope_flag {
	RF_HOST = 1,	       /* cgroups decide who is covered */
	RF_LOOP_OBSERVE = 2,   /* loopback is recorded */
	RF_LOOP_ENFORCE = 4,   /* loopback is captured */
	RF_DOWN_OPEN = 8,      /* a dead agent lets connections pass */
	RF_ROUTES_UNKNOWN = 16 /* rf_routes does not tell the whole truth (policy routing, too many) */
};

/* One scope. */
struct scope {
	__u32 mode;  /* enum rf_mode */
	__u32 flags; /* enum rf_scope_flag */
	__be32 source4[4]; /* what a workload sees as its own address when no route tells; zero for unknown */
	__be32 source6[4];
};

/* The agent of this instance, one record. */
struct agent {
	__u64 heartbeat;  /* CLOCK_MONOTONIC, nanoseconds; the agent writes it */
	__u64 limit;	  /* nanoseconds without heartbeat after which the agent counts as gone */
	__u64 cgroup;	  /* the agent's own leaf: the loop guard */
	__u64 generation; /* of policy; a refusal of another generation is void */
};

/* A connection as its opener sees it. */
struct conn_key {
	__u64 netns; /* cookie */
	__be32 src[4];
	__be32 dst[4];
	__be16 sport;
	__be16 dport;
	__u32 pad;
};

/* What a workload dialled, and who called. */
struct note {
	__be32 dst[4];
	__be16 dport;
	__u16 flags;
	__u32 tgid;	/* in the initial pid namespace */
	__u64 start;	/* of the thread group, nanoseconds since boot; zero without BTF */
	__u64 exec_id;	/* zero without BTF */
	__u64 cgroup;	/* of the calling task */
	__u32 uid;	/* in the initial user namespace */
	__u32 gid;
	__u32 device;	/* interface index the socket was bound to, and no longer is */
	__u32 pad;
	__be32 bound[4]; /* address the socket was bound to; zero for none */
	__be32 self[4];	 /* address that getsockname shows; zero for the kernel's own answer */
};

/* One life of a thread group. */
struct image_key {
	__u32 tgid; /* in the initial pid namespace */
	__u32 pad;
	__u64 start; /* nanoseconds since boot */
};

enum rf_sock_kind {
	RF_SOCK_PLAIN = 0,    /* nothing but its creator is known */
	RF_SOCK_CAPTURED = 1, /* a workload's, redirected: note tells where it wanted to go */
	RF_SOCK_SERVED = 2,   /* a workload's, accepted from the agent: note.dst is the real client */
	RF_SOCK_AGENT = 3,    /* the agent's, about to dial a local workload: note.dst is the client to show */
};

/* What is known of one socket, as long as it lives. */
struct sock_state {
	__u32 kind; /* enum rf_sock_kind */
	__u32 pad;
	__u64 creator;	 /* cgroup that made the socket; zero when it is older than the hooks */
	struct note note;
};

/* A dial of the agent to a local workload. */
struct exemption {
	__be32 client[4]; /* shown to the workload as its peer; zero for none */
	__be16 port;
	__u16 pad;
	__u32 pad2;
};

struct port_key {
	__u64 netns;
	__u16 port; /* host byte order */
	__u16 seeded; /* 1: found by the agent, 0: counted by the kernel side */
	__u32 pad;
};

#define RF_MIXED (~0ULL)

struct port {
	__u32 listeners;
	__u32 pad;
	__u64 cgroup; /* that made them; zero when unknown, RF_MIXED for more than one */
};

struct cgroup_key {
	__u64 netns;
	__u64 cgroup;
};

struct listener_key {
	__u64 netns;
	__u32 family; /* AF_INET or AF_INET6 */
	__u32 pad;
};

struct route_key {
	__u32 prefixlen; /* in bits: 64 for the namespace, then of the mapped address */
	__u32 netns_hi;	 /* two halves, because the trie compares bytes, not numbers */
	__u32 netns_lo;
	__be32 dst[4];
};

enum rf_route_kind {
	RF_ROUTE_UNICAST = 0,
	RF_ROUTE_LOCAL = 1,
	RF_ROUTE_BROADCAST = 2,
	RF_ROUTE_ERROR = 3, /* unreachable, prohibit, blackhole */
};

struct route {
	__u32 kind;  /* enum rf_route_kind */
	__u32 error; /* errno of RF_ROUTE_ERROR */
	__be32 source[4]; /* zero for unknown */
};

/* A refusal that the kernel side carries out by itself. */
struct deny_key {
	__u64 netns;
	__u64 cgroup;
	__u64 start; /* start, exec_id and tgid are zero in a refusal of the whole cgroup */
	__u64 exec_id;
	__be32 dst[4];
	__be16 dport;
	__u16 pad;
	__u32 tgid;
	__u32 uid;
	__u32 gid;
};

/* A refusal that connect makes by itself. Both must hold: policy may change, and so may who owns the destination. */
struct deny {
	__u64 generation; /* of the policy that refused */
	__u64 until;	  /* CLOCK_MONOTONIC, nanoseconds */
};

enum rf_event_kind {
	RF_EV_CONNECTED = 0,
	RF_EV_ACCEPTED = 1,
	RF_EV_LISTENING = 2,
	RF_EV_CLOSED = 3,
	RF_EV_REFUSED = 4,
	RF_EV_BYPASS = 5,
};

/* Why something was done; index of rf_counters, and the reason in an event. */
enum rf_reason {
	RF_CAPTURED = 0,
	RF_WATCHED,
	RF_LOOPBACK,
	RF_OWN_PORT,
	RF_KERNEL_SOCKET,
	RF_EXCEPTED,
	RF_PRIVILEGED_PORT,
	RF_LINK_LOCAL,
	RF_GROUP_ADDRESS,
	RF_NO_ROUTE,
	RF_DEVICE,
	RF_AGENT_DOWN,
	RF_DENIED,
	RF_NO_MEMORY,
	RF_NO_NOTE,
	RF_PROTOCOL,
	RF_PORT_RESERVED,
	RF_STEERED,
	RF_STEER_REFUSED,
	RF_STEER_PASSED,
	RF_UNSTEERED,
	RF_PORTS_FULL,
	RF_EXEMPT_FULL,
	RF_EVENT_LOST,
	RF_MARKED,
	RF_MULTIPATH,
	RF_REASONS,
};

/* One thing seen. */
struct event {
	__u64 netns;
	__u64 time; /* CLOCK_MONOTONIC, nanoseconds */
	__u32 kind;   /* enum rf_event_kind */
	__u32 reason; /* enum rf_reason */
	__u32 bypass; /* 1: the scope's rules leave it alone */
	__u16 protocol;
	__be16 sport;
	__be32 src[4];
	struct note note;
	char comm[16];
};

#endif
