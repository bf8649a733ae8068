package ebpf_test

import (
	"testing"

	"ringfence.dev/policy/authz"
	"ringfence.dev/test/nettest"
)

// Each listening socket that comes or goes in a scope moves the count.
func TestListensCounts(t *testing.T) {
	w := newWorld(t, authz.Enforce, nil)
	before := w.b().Listens()
	srv := listen(t, w.host, appDir, "192.0.2.1:8085")
	opened := w.b().Listens()
	if opened == before {
		t.Error("a new listener left the count as it was")
	}
	srv.stop()
	nettest.Wait(t, "the listener's end to be counted", func() bool { return w.b().Listens() > opened })
}
