// Package faults holds no code of its own: its tests run the built agent on real
// namespaces and hold it to what it says about hostile workloads, dead and
// hanging agents, exhausted resources and broken settings, in eBPF mode and in
// iptables mode.
//
// The invariant of all of them: what an enforcing scope does not permit reaches
// nobody, whatever has gone wrong.
package faults
