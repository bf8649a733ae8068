package ca

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// childInit turns this test binary into a process that makes a CA: it says when
// it is ready, waits for a line, runs Init and tells what it found.
func childInit() {
	dir := os.Getenv("RINGFENCE_TEST_INIT_DIR")
	if dir == "" {
		return
	}
	fmt.Println("ready")
	bufio.NewReader(os.Stdin).ReadString('\n')
	created, err := Init(dir, lab, Options{})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	a, err := Open(dir, Options{})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(created, a.Status().Roots[0].Fingerprint, a.Status().Serial)
	os.Exit(0)
}

type child struct {
	cmd     *exec.Cmd
	release func() error
	out     *bufio.Reader
}

func startChild(t *testing.T, dir string) child {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "RINGFENCE_TEST_INIT_DIR="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := child{cmd: cmd, out: bufio.NewReader(out), release: in.Close}
	if line, err := c.out.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
	return c
}

// TestConcurrentInit starts processes that make a CA in one directory at the
// same moment: one wins, and all see its state.
func TestConcurrentInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	var children []child
	for range 4 {
		children = append(children, startChild(t, dir))
	}
	for _, c := range children {
		if err := c.release(); err != nil {
			t.Fatal(err)
		}
	}
	winners, seen := 0, map[string]bool{}
	for _, c := range children {
		var created bool
		var root, serial string
		line, err := c.out.ReadString('\n')
		if _, serr := fmt.Sscan(line, &created, &root, &serial); err != nil || serr != nil {
			t.Fatalf("child said %q", line)
		}
		if err := c.cmd.Wait(); err != nil {
			t.Error(err)
		}
		if created {
			winners++
		}
		seen[root+serial] = true
	}
	if winners != 1 || len(seen) != 1 {
		t.Errorf("%d winners and %d different CAs, want one of each", winners, len(seen))
	}
}
