/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/* The BPF target has no architecture of its own: the generic types serve, and the build does not depend on the machine. */
#include <asm-generic/types.h>
