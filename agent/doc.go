// Package agent is the node daemon: it reads the settings, opens listeners
// inside each scope, starts a capture back end, and connects attestation,
// policy, credentials and the relay to one another. It owns no protocol and no
// decision of its own.
//
// The invariant: what the agent reports as protected has been read back from
// the kernel. A scope that cannot be fully covered is never called protected.
package agent
