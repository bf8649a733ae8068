/* SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0-only) */
/*
 * The few kernel structures we look into, with only the members we read.
 * Offsets are relocated against the running kernel's BTF; code that reads them
 * stands behind rf_btf, which the loader sets, so that a kernel without BTF
 * runs everything else.
 */
#ifndef RINGFENCE_KERNEL_H
#define RINGFENCE_KERNEL_H

#include <linux/types.h>
#include <stdbool.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct task_struct {
	struct task_struct *group_leader;
	__u64 start_boottime; /* Linux 5.5 */
	__u64 self_exec_id;   /* 64 bits since Linux 5.7 */
};

struct sock {
	__u8 sk_kern_sock : 1;
};

struct tcp_sock {
	bool is_mptcp; /* Linux 5.6, with CONFIG_MPTCP */
};

#pragma clang attribute pop

#endif
