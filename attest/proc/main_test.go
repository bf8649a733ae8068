package proc

import (
	"fmt"
	"os"
	"testing"
)

// TestMain fails the package when its tests leave descriptors open.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "inside-pid-namespace":
			os.Exit(report(tryRecycle()))
		case "inside-thread":
			os.Exit(report(hold()))
		}
	}
	before := descriptors()
	code := m.Run()
	if after := descriptors(); code == 0 && after > before {
		fmt.Fprintf(os.Stderr, "%d descriptors before the tests, %d after\n", before, after)
		code = 1
	}
	os.Exit(code)
}

func descriptors() int {
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	n := 0
	for _, e := range dir {
		// The runtime's poller opens an epoll and an event descriptor when it likes.
		if link, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && link[0] == '/' {
			n++
		}
	}
	return n
}

func report(err error) int {
	if err == nil {
		return 0
	}
	fmt.Println(err)
	return 1
}
