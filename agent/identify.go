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
	return i.a.attestor.Identify(ctx, f.Caller)
}

func (i identifier) Owner(ctx context.Context, scope string, addr netip.AddrPort) (workload.Identity, error) {
	ns, err := i.a.scopeNS(scope)
	if err != nil {
		return workload.Identity{}, err
	}
	return i.a.attestor.Owner(ctx, ns, addr)
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
