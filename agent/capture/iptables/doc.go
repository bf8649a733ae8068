// Package iptables is the capture back end for kernels without the eBPF hooks:
// REDIRECT takes what workloads dial, TPROXY what is dialled to them.
//
// What each rule is for, in the order in which a packet meets them:
//
//   - mangle OUTPUT (loopback capture only) marks what the agent itself sends over
//     lo with a random value of this process, and wipes that value from anybody
//     else's packets, because on lo's receiving side a socket's owner is not known.
//   - nat OUTPUT redirects a covered workload's SYN to 127.0.0.1 or ::1, port 15001.
//   - filter OUTPUT (enforce) refuses what ought to have been redirected and was not:
//     INVALID and untracked segments, for which the nat table is never asked, other
//     stream protocols, link-local destinations, and whatever an earlier nat rule let go.
//   - mangle PREROUTING hands the SYN of a connection to a local, listening port to
//     port 15006. xt_socket asks the kernel's own listener table at that moment, so
//     a closed port is still refused by the kernel, and no list of ports can be stale.
//     The conntrack mark then keeps the whole connection there: an ACK that answers a
//     SYN cookie finds no socket of its own, and would otherwise reach the workload.
//   - filter INPUT checks that the socket about to receive a captured SYN belongs to
//     the agent's cgroup. TPROXY has attached it to the packet, so xt_cgroup can see it.
//     A stranger who binds 15001 while the agent is dead is reset, not served; binding
//     with IP_TRANSPARENT, which TPROXY asks for, already takes CAP_NET_ADMIN or _RAW.
//
// No routing rule and no address of our own is needed: TPROXY is used for packets
// that are for this machine anyway.
//
// The loop guard is xt_cgroup on the agent's own cgroup leaf. The rules hold that
// very cgroup, not its name: a leaf that was removed and made again is another
// one, which Verify notices, and Add always writes all rules anew.
//
// When the agent is gone, the kernel alone already refuses: there is no socket of
// the agent's cgroup to accept. Scopes that shall pass instead, and agents that
// hang, need the guard: a small process (see [RunGuard]) that holds each scope's
// last will and writes it when the agent's heartbeat ends.
//
// Known limits, each also told by Limits or Verify: who called is found after the
// fact, through socket tables and /proc (the weaker kind of evidence); a socket
// bound to a device other than lo cannot be redirected, its connect times out;
// the server sees the agent's address; UDP is not captured.
package iptables
