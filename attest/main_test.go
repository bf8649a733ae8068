package attest

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// TestMain doubles as the programs that tests start as workloads.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "play:") {
		if err := play(strings.TrimPrefix(os.Args[1], "play:"), os.Args[2:]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("ringfence.dev/cni/netns.(*openerThread).start.func1"))
}

// play is a workload: it says "ready" and lives until its input ends.
func play(role string, args []string) error {
	switch role {
	case "wait":
	case "listen":
		l, err := net.Listen("tcp", args[0])
		if err != nil {
			return err
		}
		defer l.Close()
	case "dial":
		c, err := net.Dial("tcp", args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Println(c.LocalAddr())
	case "exec": // becomes another program when told to
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		fmt.Println("ready")
		<-hup
		return syscall.Exec(args[0], args, os.Environ())
	}
	fmt.Println("ready")
	_, err := os.Stdin.Read(make([]byte, 1))
	if err != nil && err.Error() == "EOF" {
		return nil
	}
	return err
}
