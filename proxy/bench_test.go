package proxy_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringfence.dev/policy/authz"
	"ringfence.dev/proxy/proxytest"
)

// The benchmarks measure the CPU of both agents together, without the load
// and the origin: those run in child processes of the test binary, which
// BenchmarkMain-like helpers below start by an environment variable.
//
//	rest   one GET at a time per connection, keep-alive, 200 octets back
//	close  a new connection per request
//	big    1 MiB back per request
//
// cpu-us/op is user plus system time of this process, the relay pair, per request.
const childEnv = "RINGFENCE_BENCH_CHILD"

func init() {
	role, arg, ok := strings.Cut(os.Getenv(childEnv), " ")
	if !ok {
		return
	}
	switch role {
	case "origin":
		originMain(arg)
	case "load":
		loadMain(arg)
	}
	os.Exit(0)
}

// originMain answers GET /N with N octets, on an address.
func originMain(addr string) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		panic(err)
	}
	fmt.Println(l.Addr())
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); os.Exit(0) }()
	big := make([]byte, 1<<20)
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go answerAll(c, big)
	}
}

func answerAll(c net.Conn, big []byte) {
	defer c.Close()
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return
		}
		size, _ := strconv.Atoi(string(bytes.Fields(line)[1][1:]))
		for len(line) > 2 {
			if line, err = r.ReadSlice('\n'); err != nil {
				return
			}
		}
		head := "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + strconv.Itoa(size) + "\r\n\r\n"
		b := net.Buffers{[]byte(head), big[:size]}
		if _, err := b.WriteTo(c); err != nil {
			return
		}
	}
}

// loadMain makes requests: "ADDR CONNECTIONS SIZE REUSE SECONDS PORTBASE". It
// prints the number of requests and the median and 99th percentile in microseconds.
func loadMain(arg string) {
	f := strings.Fields(arg)
	conns, _ := strconv.Atoi(f[1])
	size, reuse := f[2], f[3] == "true"
	seconds, _ := strconv.ParseFloat(f[4], 64)
	end := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	var wg sync.WaitGroup
	var mu sync.Mutex
	var all []time.Duration
	for range conns {
		wg.Go(func() {
			times := client(f[0], size, reuse, end)
			mu.Lock()
			all = append(all, times...)
			mu.Unlock()
		})
	}
	wg.Wait()
	sortDurations(all)
	fmt.Println(len(all), all[len(all)/2].Microseconds(), all[len(all)*99/100].Microseconds())
}

func client(addr, size string, reuse bool, end time.Time) (times []time.Duration) {
	req := []byte("GET /" + size + " HTTP/1.1\r\nHost: orders.shop.example\r\nUser-Agent: bench/1\r\nAccept: */*\r\nAccept-Encoding: gzip\r\n\r\n")
	var c net.Conn
	var r *bufio.Reader
	for time.Now().Before(end) {
		start := time.Now()
		if c == nil {
			var err error
			if c, err = net.Dial("tcp", addr); err != nil {
				panic(err)
			}
			r = bufio.NewReaderSize(c, 64<<10)
		}
		if _, err := c.Write(req); err != nil {
			panic(err)
		}
		length := -1
		for {
			line, err := r.ReadSlice('\n')
			if err != nil {
				panic(err)
			}
			if v, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
				length, _ = strconv.Atoi(string(bytes.TrimSpace(v)))
			}
			if len(line) == 2 {
				break
			}
		}
		if _, err := r.Discard(length); err != nil {
			panic(err)
		}
		times = append(times, time.Since(start))
		if !reuse {
			c.Close()
			c = nil
		}
	}
	return times
}

func sortDurations(d []time.Duration) {
	// slices.Sort, without keeping the load generator's profile out of the way
	for gap := len(d) / 2; gap > 0; gap /= 2 {
		for i := gap; i < len(d); i++ {
			for j := i; j >= gap && d[j-gap] > d[j]; j -= gap {
				d[j-gap], d[j] = d[j], d[j-gap]
			}
		}
	}
}

func child(b *testing.B, role, arg string) (*exec.Cmd, *bufio.Reader) {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+role+" "+arg)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	return cmd, bufio.NewReader(out)
}

func cpu() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRelay needs -benchtime 1x: one run of a fixed length.
func BenchmarkRelay(b *testing.B) {
	for _, load := range []struct {
		name  string
		conns int
		size  string
		reuse bool
	}{
		{"rest64", 64, "200", true}, {"rest1", 1, "200", true}, {"close64", 64, "200", false}, {"big4", 4, "1048576", true},
	} {
		b.Run(load.name, func(b *testing.B) { benchmark(b, load.conns, load.size, load.reuse) })
	}
}

func benchmark(b *testing.B, conns int, size string, reuse bool) {
	ca := proxytest.NewCA(b, "lab.test")
	far := newHost(b, ca, hostConfig{mode: authz.Enforce, policy: proxytest.Policy{HTTPOnly: httpOnly}})
	near := newHost(b, ca, hostConfig{mode: authz.Enforce})
	near.who.SetCaller(uid, who("a/sa/caller"))
	near.dec.Quiet()
	far.dec.Quiet()
	_, out := child(b, "origin", far.net.IP.String()+":0")
	line, err := out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	to := netip.MustParseAddrPort(strings.TrimSpace(line))
	far.who.SetOwner(to.Port(), who("b/sa/web"))
	near.net.ExpectAll(to, uid)
	run := func(seconds float64) (requests, p50, p99 float64) {
		_, out := child(b, "load", fmt.Sprintf("%s %d %s %v %v", near.outbound, conns, size, reuse, seconds))
		if _, err := fmt.Fscan(out, &requests, &p50, &p99); err != nil {
			b.Fatal(err)
		}
		return requests, p50, p99
	}
	run(0.3)
	for b.Loop() {
		before := cpu()
		requests, p50, p99 := run(2)
		used := cpu() - before
		b.ReportMetric(float64(used.Microseconds())/requests, "cpu-us/req")
		b.ReportMetric(requests/2, "req/s")
		b.ReportMetric(p50, "p50-us")
		b.ReportMetric(p99, "p99-us")
	}
	b.ReportMetric(0, "ns/op")
}
