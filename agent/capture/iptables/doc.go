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
// A rule about a cgroup takes all cgroups below it, those made after the rule was
// written included. So a host scope's table says where covered ones may come
// ([capture.Cgroup], Below), and the rules capture there at once; whoever is directly in
// such a cgroup, or in a new one that turns out uncovered, is let through by the agent
// undecided until the table has it, about a tenth of a second later. The root is
// never taken that way: a cgroup made directly below it is captured only
// from its first table on. Ports are steered unless their listener is known to be
// uncovered, which is looked up once a second; until then, the agent lets pass.
//
// When the agent is gone, the kernel alone already refuses: there is no socket of
// the agent's cgroup to accept. Scopes that shall pass instead, and agents that
// hang, need the guard: a small process (see [RunGuard]) that holds each scope's
// last will and writes it when the agent's heartbeat ends.
//
// What it costs when nothing happens: scopes are read back in turn, one each three
// seconds, by iptables-save and ip6tables-save of each variant in use (twice on a
// host, where published ports are looked for too), so that a node with 200 scopes
// sees each every ten minutes, and one with a single scope every three seconds. The
// guard gets one heartbeat, whatever the number of scopes. Somebody's change to
// rules is therefore noticed within 3 s times the number of scopes; Verify looks at
// once, and status and check call it. Sockets are sampled in watch mode only, for
// loopback: observe (one scope a second, connections that stay on the host), and for
// the listeners of host scopes of which a part is left alone.
//
// What it costs per connection: one question to conntrack, one to the socket tables,
// and a look at the descriptors of the programs that called before. Who has not called
// before is looked for in the cgroup of the socket, then in all of /proc.
//
// Removing the rules removes the tables that came with them (nft), unless they are in
// use by now; conntrack lets go of the namespace with the last rule that needs it. The
// legacy variant's tables stay, empty, as long as the namespace.
//
// Known limits, each also told by Limits or Verify: who called is found after the
// fact, through socket tables and /proc (the weaker kind of evidence); a socket
// bound to a device other than lo cannot be redirected, its connect times out;
// the server sees the agent's address; UDP is not captured.
package iptables
