package netns_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/cni/netns"
	"ringfence.dev/test/nettest"
)

// scratch makes a namespace and opens it.
func scratch(t testing.TB) *netns.Handle {
	t.Helper()
	nettest.RequireRoot(t)
	h, err := netns.Open(nettest.NetNS(t, "netns").Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func TestOpenRefusesWhatIsNoNamespace(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{plain, "/proc/self/ns/mnt", "/nonexistent"} {
		if h, err := netns.Open(path); err == nil {
			h.Close()
			t.Errorf("Open(%s) succeeded", path)
		}
	}
}

func TestSelf(t *testing.T) {
	h, err := netns.Self()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if !h.Own() || h.Cookie() == 0 {
		t.Errorf("own = %v, cookie = %d", h.Own(), h.Cookie())
	}
}

func TestDoAndSocketAreInside(t *testing.T) {
	h := scratch(t)
	self, err := netns.Self()
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	if h.Own() || h.Same(self) || h.Cookie() == self.Cookie() {
		t.Fatal("the scratch namespace is taken for our own")
	}
	inside := -1
	if err := h.Do(func() error {
		ifs, err := net.Interfaces()
		inside = len(ifs)
		return err
	}); err != nil || inside != 1 {
		t.Errorf("a fresh namespace shows %d interfaces (%v), want only lo", inside, err)
	}
	fd, err := h.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if got, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil || got != h.Cookie() {
		t.Errorf("socket's namespace cookie = %d (%v), want %d", got, err, h.Cookie())
	}
	if flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
		t.Error("socket is not close-on-exec")
	}
}

func TestDoReturnsErrorAndPanic(t *testing.T) {
	h := scratch(t)
	want := errors.New("inner")
	if err := h.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("Do = %v", err)
	}
	if err := h.Do(func() error { panic("boom") }); err == nil {
		t.Error("a panic inside is not reported")
	}
}

func TestConcurrentUseAndClose(t *testing.T) {
	h := scratch(t)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 50 {
				fd, err := h.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
				if err != nil {
					t.Error(err)
					return
				}
				if got, _ := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); got != h.Cookie() {
					t.Error("socket opened in another namespace")
				}
				unix.Close(fd)
			}
		})
	}
	wg.Wait()
	h.Close()
	h.Close()
	if _, err := h.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); !errors.Is(err, netns.ErrClosed) {
		t.Errorf("Socket after Close: %v", err)
	}
	if err := h.Do(func() error { return nil }); !errors.Is(err, netns.ErrClosed) {
		t.Errorf("Do after Close: %v", err)
	}
}

func BenchmarkSocket(b *testing.B) {
	for _, bench := range []struct {
		name string
		open func(testing.TB) *netns.Handle
	}{
		{"own", func(t testing.TB) *netns.Handle {
			h, err := netns.Self()
			if err != nil {
				t.Fatal(err)
			}
			return h
		}},
		{"foreign", scratch},
	} {
		b.Run(bench.name, func(b *testing.B) {
			h := bench.open(b)
			defer h.Close()
			b.ReportAllocs()
			for b.Loop() {
				fd, err := h.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
				if err != nil {
					b.Fatal(err)
				}
				unix.Close(fd)
			}
		})
	}
}
