// Package e2e tests the product as its user has it: the built command, two
// hosts with an agent each, and real programs that know nothing of it. Every
// test runs in eBPF mode and in iptables mode.
//
// What can be tested lower down is tested there. Here belongs what only shows
// when everything is put together.
package e2e
