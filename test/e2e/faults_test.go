package e2e

import (
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ringfence.dev/test/nettest"
	"ringfence.dev/tools/ringfence/lab"
)

// What becomes of a scope whose agent dies depends on its mode alone.
func TestKilledAgent(t *testing.T) {
	program(t, "curl")
	for _, mode := range []string{"enforce", "dry-run", "watch"} {
		t.Run(mode, func(t *testing.T) {
			forEachCapture(t, lab.Options{Agents: []string{"a"}, Mode: mode}, func(t *testing.T, w *world) {
				w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
				if out, _ := w.curl("a", "shop", "http://192.0.2.2/before"); !strings.HasSuffix(out, "\n200") {
					t.Fatalf("before: %s", out)
				}
				w.kill("a", unix.SIGKILL)
				if mode == "enforce" {
					w.refused("/while-dead")
				} else {
					nettest.Wait(t, "traffic to pass without an agent", func() bool {
						out, _ := w.curl("a", "shop", "http://192.0.2.2/while-dead")
						return strings.HasSuffix(out, "\n200")
					})
				}
				if err := w.Restart(t.Context(), "a"); err != nil {
					t.Fatal(err)
				}
				if out, _ := w.curl("a", "shop", "http://192.0.2.2/after"); !strings.HasSuffix(out, "\n200") {
					t.Errorf("with the next agent: %s", out)
				}
			})
		})
	}
}

// A process that is stopped holds its listeners, but answers nobody.
func TestStoppedAgent(t *testing.T) {
	program(t, "curl")
	for _, mode := range []string{"enforce", "dry-run"} {
		t.Run(mode, func(t *testing.T) {
			forEachCapture(t, lab.Options{Agents: []string{"a"}, Mode: mode}, func(t *testing.T, w *world) {
				w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
				w.kill("a", unix.SIGSTOP)
				if mode == "enforce" {
					w.refused("/while-stopped")
				} else {
					nettest.Wait(t, "traffic to pass a stopped agent", func() bool {
						out, _ := w.curl("a", "shop", "--max-time", "2", "http://192.0.2.2/while-stopped")
						return strings.HasSuffix(out, "\n200")
					})
				}
				w.kill("a", unix.SIGCONT)
				nettest.Wait(t, "traffic to pass again", func() bool {
					out, _ := w.curl("a", "shop", "--max-time", "2", "http://192.0.2.2/after")
					return strings.HasSuffix(out, "\n200")
				})
			})
		})
	}
}

func (w *world) kill(host string, sig unix.Signal) {
	w.t.Helper()
	a, _ := w.Agent(host)
	if err := unix.Kill(a.PID(), sig); err != nil {
		w.t.Fatal(err)
	}
	if sig == unix.SIGKILL {
		nettest.Wait(w.t, "the agent to be gone", func() bool { return a.PID() == 0 })
	}
}

// refused fails unless the shop's request is refused without reaching the server.
func (w *world) refused(path string) {
	w.t.Helper()
	out, _ := w.curl("a", "shop", "--max-time", "4", "http://192.0.2.2"+path)
	if !strings.HasSuffix(out, "\n000") || strings.Contains(w.log("web"), "request "+path+"\n") {
		w.t.Errorf("an enforcing scope let %s through: %s", path, out)
	}
}

// Nobody may take the agent's place while it is down.
func TestAgentPortsWhileDown(t *testing.T) {
	forEachCapture(t, lab.Options{Agents: []string{"a"}}, func(t *testing.T, w *world) {
		w.kill("a", unix.SIGKILL)
		w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
		for _, port := range []int{15001, 15006, 15008} {
			out, code := w.run("a", "squatter", helperCommand("bind", "0.0.0.0:"+strconv.Itoa(port))...)
			if w.capture == "ebpf" && code == 0 {
				t.Errorf("port %d could be taken: %s", port, out)
			}
		}
		// Where the port cannot be kept, what is captured must not be handed to who has it.
		if w.capture == "iptables" {
			w.serve("a", "squatter", 15001, helperCommand("greet", "0.0.0.0:15001")...)
		}
		out, _ := w.feed("captured\n", "a", "shop", helperCommand("talk", "192.0.2.2:80", "whole")...)
		if strings.Contains(out, "greetings") {
			t.Errorf("captured traffic was handed to another program: %s", out)
		}
	})
}

// A direct dial to the agent's own ports gets nothing.
func TestDirectDial(t *testing.T) {
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		for _, target := range []string{"127.0.0.1:15001", "127.0.0.1:15006", "192.0.2.1:15001", "192.0.2.2:15001", "192.0.2.2:15006", "192.0.2.2:15008"} {
			out, _ := w.feed("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "a", "prober", helperCommand("talk", target, "whole")...)
			if strings.Contains(out, "HTTP/1.") {
				t.Errorf("%s answers: %s", target, out)
			}
		}
	})
}

// A host without an agent has no identity, and policy decides what that means.
func TestStranger(t *testing.T) {
	program(t, "curl")
	forEachCapture(t, lab.Options{Agents: []string{"b"}, Policies: policies(t, httpPolicy+`
@id("strangers-see-health")
permit (principal == Anonymous::"192.0.2.1", action == Action::"GET", resource in Service::"spiffe://lab.test/ns/b/sa/web")
when { context.request.path == "/health" };
`)}, func(t *testing.T, w *world) {
		w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
		out, _ := w.curl("a", "shop", "http://192.0.2.2/health")
		if !strings.HasSuffix(out, "\n200") {
			t.Errorf("permitted to strangers: %s", out)
		}
		out, _ = w.curl("a", "shop", "-H", "X-Forwarded-Client-Cert: URI=spiffe://lab.test/ns/a/sa/shop", "http://192.0.2.2/orders")
		if !strings.HasSuffix(out, "\n401") {
			t.Errorf("a stranger with a forged identity: %s", out)
		}
		if strings.Contains(w.log("web"), "request /orders") {
			t.Error("the server was reached")
		}
	})
}

// An agent that serves a scope whose peer has none falls back to plaintext only by policy.
func TestPeerWithoutAgent(t *testing.T) {
	program(t, "curl")
	const mesh = `@id("only-in-the-mesh")
permit (principal, action == Action::"connect", resource) when { context.mesh };
`
	for name, text := range map[string]string{"permitted": "", "refused": mesh} {
		t.Run(name, func(t *testing.T) {
			o := lab.Options{Agents: []string{"a"}}
			if text != "" {
				o.Policies = policies(t, text)
			}
			forEachCapture(t, o, func(t *testing.T, w *world) {
				w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
				if text != "" {
					w.refused("/x")
					return
				}
				if out, _ := w.curl("a", "shop", "http://192.0.2.2/x"); !strings.HasSuffix(out, "\n200") {
					t.Errorf("plaintext that policy permits: %s", out)
				}
			})
		})
	}
}
