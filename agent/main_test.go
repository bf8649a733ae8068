package agent

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// The guard of iptables mode is this same program.
	if len(os.Args) > 2 && os.Args[1] == "agent" && os.Args[2] == "--guard" {
		runGuardForTest()
		return
	}
	goleak.VerifyTestMain(m)
}
