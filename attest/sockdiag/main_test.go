package sockdiag_test

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails the package when its tests leave goroutines. The thread that
// opens sockets in foreign namespaces lives as long as the process.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("ringfence.dev/cni/netns.(*openerThread).start.func1"))
}
