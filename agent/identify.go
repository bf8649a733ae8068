package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/attest/workload"
	"ringfence.dev/proxy"
	"ringfence.dev/proxy/flow"
)

// identifier gives the relay the attestor's answers.
type identifier struct{ a *Agent }

var _ proxy.Identifier = identifier{}

func (i identifier) Caller(ctx context.Context, f flow.Flow) (workload.Identity, error) {
	who, err := i.a.attestor.Identify(ctx, f.Caller)
	if err != nil {
		// Who is not covered may go on without an identity, if it is known to be not covered.
		if sc := i.a.partOfHost(f.Scope); sc != nil {
			who.Unit, who.Exe = sc.cover.describe(f.Caller)
		}
	}
	return who, err
}

func (i identifier) Owner(ctx context.Context, scope string, addr netip.AddrPort) (workload.Identity, error) {
	sc, err := i.a.scopeNamed(scope)
	if err != nil {
		return workload.Identity{}, err
	}
	who, err := i.a.attestor.Owner(ctx, sc.ns, addr)
	if err != nil && i.a.partOfHost(scope) != nil && i.a.servedAlone(sc, addr) {
		// It need not have a name of its own to be left alone.
		return i.a.nodeIdentity(), nil
	}
	return who, err
}

func (i identifier) Sole(ctx context.Context, scope string) (workload.Identity, error) {
	ns, err := i.a.scopeNS(scope)
	if err != nil {
		return workload.Identity{}, err
	}
	who, err := i.a.attestor.Sole(ctx, ns)
	if errors.Is(err, workload.ErrUnknown) || errors.Is(err, workload.ErrAmbiguous) {
		return i.a.nodeIdentity(), nil
	}
	return who, err
}

// nodeName is the last segment of the agent's own SPIFFE ID.
const nodeName = "ringfence"

// nodeIdentity is the node's own identity, used where no workload is meant.
func (a *Agent) nodeIdentity() workload.Identity {
	id, err := spiffeid.FromSegments(a.settings.TrustDomain, "ns", a.settings.Host, "sa", nodeName)
	if err != nil {
		panic(fmt.Sprintf("checked settings give no node identity: %v", err)) // Host was checked as a segment
	}
	return workload.Identity{ID: id, Name: nodeName}
}
