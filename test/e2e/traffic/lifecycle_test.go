package traffic_test

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"ringfence.dev/test/e2e/world"
	"ringfence.dev/test/nettest"
	"ringfence.dev/tools/ringfence/lab"
)

// download is a transfer under way: each byte that the test sends comes back.
type download struct {
	*world.Conn
	t testing.TB
	r io.Reader
}

func startDownload(t testing.TB, p *world.Puppet, addr string) *download {
	t.Helper()
	c := p.MustDial(addr)
	c.Send("POST /slow HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n")
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("download: %+v, %v", resp, err)
	}
	d := &download{c, t, resp.Body}
	d.more("begun")
	return d
}

// more fails unless text comes back.
func (d *download) more(text string) {
	d.t.Helper()
	got := make([]byte, 1)
	for _, b := range []byte(text) {
		d.Send("1\r\n" + string(b) + "\r\n")
		if _, err := io.ReadFull(d.r, got); err != nil || got[0] != b {
			d.t.Fatalf("of %q came %q, %v", text, got, err)
		}
	}
}

func (d *download) finish() {
	d.t.Helper()
	d.Send("0\r\n\r\n")
	if rest, err := io.ReadAll(d.r); len(rest) > 0 || err != nil {
		d.t.Errorf("the download ended with %q, %v", rest, err)
	}
	_ = d.Close()
}

// An agent that is told to stop takes nothing new and lets what runs finish.
func TestDrain(t *testing.T) {
	world.ForEach(t, lab.Options{}, func(t *testing.T, w *world.World) {
		shop := w.Puppet("a", "shop")
		w.Puppet("b", "web").Web("[::]:80")
		for _, host := range []string{"a", "b"} {
			t.Run("host "+host, func(t *testing.T) {
				w.Configure(host, func(s map[string]any) { s["drain_timeout"] = "30s" })
				if err := w.Restart(t.Context(), host); err != nil {
					t.Fatal(err)
				}
				d := startDownload(t, shop.In(t), "192.0.2.2:80")
				agent, _ := w.Agent(host)
				if err := syscall.Kill(agent.PID(), syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				nettest.Wait(t, "the agent to say that it stops", func() bool { return strings.Contains(agent.Tail(3), "stopping") })
				d.more("goes on while the agent waits for it")
				refusedDial(t, shop, "192.0.2.2:80")
				d.more("and on")
				if agent.PID() == 0 {
					t.Fatal("the agent did not wait")
				}
				d.finish()
				nettest.Wait(t, "the agent to end with its last connection", func() bool { return agent.PID() == 0 })
				if err := w.Restart(t.Context(), host); err != nil {
					t.Fatal(err)
				}
				startDownload(t, shop.In(t), "192.0.2.2:80").finish()
			})
		}
	})
}

// `lab restart` is a stop with the lab's short drain; what outlives that is cut, and all works again after.
func TestLabRestart(t *testing.T) {
	world.ForEach(t, lab.Options{}, func(t *testing.T, w *world.World) {
		shop := w.Puppet("a", "shop")
		w.Puppet("b", "web").Web("[::]:80")
		for _, host := range []string{"a", "b"} {
			d := startDownload(t, shop, "[2001:db8::2]:80")
			before := w.Status(host)
			if r := w.Ringfence(host, "lab", "--name", w.Options().Name, "restart", host); r.Code != 0 {
				t.Fatalf("lab restart: %+v", r)
			}
			if _, err := io.ReadAll(d.r); err == nil {
				t.Error("a connection outlived its agent's drain")
			}
			if after := w.Status(host); after.PID == before.PID || !after.Ready || !after.Scopes[0].Protected {
				t.Errorf("after the restart: %+v", after)
			}
			startDownload(t, shop, "[2001:db8::2]:80").finish()
		}
	})
}

// A reload cuts what is no longer permitted, and nothing else.
func TestReload(t *testing.T) {
	const both = `@id("shop")
permit (principal == Workload::"spiffe://lab.test/ns/a/sa/shop", action == Action::"connect", resource);
`
	const guest = `@id("guest")
permit (principal == Workload::"spiffe://lab.test/ns/a/sa/guest", action == Action::"connect", resource);
`
	for _, c := range world.Captures {
		t.Run(c, func(t *testing.T) {
			dir := world.Policies(t, both+guest)
			w := world.Up(t, lab.Options{Capture: c, Policies: dir})
			shop, guest := w.Puppet("a", "shop"), w.Puppet("a", "guest")
			server := w.Puppet("b", "server")
			server.Echo("[::]:7000")
			server.Web("[::]:80")
			stays, goes := shop.MustDial("192.0.2.2:7000"), guest.MustDial("192.0.2.2:7000")
			for _, c := range []*world.Conn{stays, goes} {
				c.Send("before")
				c.Want("before")
			}
			d := startDownload(t, shop, "192.0.2.2:80")
			reload(t, w, dir, both)
			if got, err := goes.Rest(); got != "" || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the guest's connection ended with %q, %v; want a reset", got, err)
			}
			refusedDial(t, guest, "192.0.2.2:7000")
			stays.Send("after")
			stays.Want("after")
			d.more("after")

			// What does not load changes nothing, and is said.
			broken := w.Status("a").Policy.Version
			write(t, dir, "permit (everything);")
			signal(t, w, "a", syscall.SIGHUP)
			nettest.Wait(t, "the error to be shown", func() bool { return w.Status("a").Policy.Error != "" })
			if s := w.Status("a"); s.Policy.Version != broken || !strings.Contains(s.Policy.Error, "test.cedar") {
				t.Errorf("policy: %+v", s.Policy)
			}
			stays.Send("still")
			stays.Want("still")
			d.finish()
			ok := shop.MustDial("192.0.2.2:7000")
			ok.Send("new")
			ok.Want("new")
		})
	}
}

func write(t *testing.T, dir, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "test.cedar"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func signal(t *testing.T, w *world.World, host string, sig syscall.Signal) {
	t.Helper()
	a, _ := w.Agent(host)
	if err := syscall.Kill(a.PID(), sig); err != nil {
		t.Fatal(err)
	}
}

// reload puts policies in force on both hosts.
func reload(t *testing.T, w *world.World, dir, text string) {
	t.Helper()
	before := w.Status("a").Policy.Version
	write(t, dir, text)
	for _, h := range []string{"a", "b"} {
		signal(t, w, h, syscall.SIGHUP)
		nettest.Wait(t, "the new policies on host "+h, func() bool { return w.Status(h).Policy.Version != before })
	}
}
