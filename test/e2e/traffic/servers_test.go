package traffic_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ringfence.dev/test/e2e/world"
	"ringfence.dev/tools/ringfence/lab"
)

const nginxConf = `daemon off; user root; worker_processes 1; pid %[1]s/pid; error_log stderr crit; events {}
http {
  access_log off; underscores_in_headers on;
  client_body_temp_path %[1]s/1; proxy_temp_path %[1]s/2; fastcgi_temp_path %[1]s/3; uwsgi_temp_path %[1]s/4; scgi_temp_path %[1]s/5;
  server {
    listen 80; listen [::]:80;
    location /files/ { alias %[1]s/; }
    location / { return 200 "caller [$http_x_forwarded_client_cert] from [$remote_addr] for [$request_uri]\n"; }
  }
}
`

// Servers as Debian has them, each with a permit of its own.
func TestServers(t *testing.T) {
	nginx, python := world.Program(t, "nginx"), world.Program(t, "python3")
	world.ForEach(t, lab.Options{}, func(t *testing.T, w *world.World) {
		conf := filepath.Join(w.Files, "nginx.conf")
		big := strings.Repeat("three lamps\n", 1<<17)
		for path, text := range map[string]string{conf: fmt.Sprintf(nginxConf, w.Files), filepath.Join(w.Files, "big"): big} {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		w.Serve("b", "web", 80, nginx, "-p", w.Files, "-c", conf)
		w.Serve("b", "python", 8000, python, "-m", "http.server", "--bind", "::", "--directory", w.Files, "8000")
		for _, ip := range world.Addresses {
			url := "http://" + port(ip, "80")
			r := w.Curl("a", "shop", "-H", "X-Forwarded-Client-Cert: URI=spiffe://lab.test/king",
				"-H", "X_Forwarded_Client_Cert: URI=spiffe://lab.test/king", url+"/orders/7?x=1")
			if !strings.Contains(r.Out, "URI="+idShop+"]") || strings.Contains(r.Out, "king") || !strings.Contains(r.Out, "for [/orders/7?x=1]") {
				t.Errorf("nginx saw %s", r.Out)
			}
			if client := strings.TrimSuffix(ip, "2") + "1"; w.Capture == "ebpf" && !strings.Contains(r.Out, "from ["+client+"]") {
				t.Errorf("nginx saw another client: %s", r.Out)
			}
			for _, from := range []string{url + "/files/big", "http://" + port(ip, "8000") + "/big"} {
				out := filepath.Join(w.Files, "got")
				r := w.Curl("a", "shop", "-o", out, from)
				got, err := os.ReadFile(out)
				if r.Code != 0 || err != nil || string(got) != big {
					t.Errorf("%s: %+v, %d bytes of %d (%v)", from, r, len(got), len(big), err)
				}
			}
			// Python's server ends each response with the connection, and knows no POST.
			if r := w.Curl("a", "shop", "-d", "x", "http://"+port(ip, "8000")+"/"); !strings.HasSuffix(r.Out, "\n501") {
				t.Errorf("python: %+v", r)
			}
		}
	})
}

// Redis speaks two protocols on one port, one of them almost HTTP.
func TestRedisInline(t *testing.T) {
	server := world.Program(t, "redis-server")
	world.ForEach(t, lab.Options{}, func(t *testing.T, w *world.World) {
		w.Serve("b", "cache", 6379, server, "--bind", "192.0.2.2", "2001:db8::2", "--protected-mode", "no", "--save", "", "--dir", w.Files)
		shop := w.Puppet("a", "shop")
		for _, ip := range world.Addresses {
			c := shop.MustDial(port(ip, "6379"))
			for _, say := range [][2]string{
				{"SET k lamps\r\n", "+OK\r\n"}, {"GET k\r\n", "$5\r\nlamps\r\n"}, {"\r\nPING\r\n", "+PONG\r\n"},
				{"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", "$5\r\nlamps\r\n"}, {"GET k\nGET k\n", "$5\r\nlamps\r\n$5\r\nlamps\r\n"},
			} {
				c.Send(say[0])
				c.Want(say[1])
			}
			_ = c.Close()
			c = shop.MustDial(port(ip, "6379"))
			c.SendBytewise("GET k\r\n") // begins as a request line does
			c.Want("$5\r\nlamps\r\n")
			_ = c.Close()
			// Redis answers what it takes for HTTP by closing, to protect browsers' users. So it shall.
			c = shop.MustDial(port(ip, "6379"))
			c.Send("POST / HTTP/1.1\r\nHost: x\r\n\r\n")
			if got, _ := c.Rest(); strings.Contains(got, "HTTP/1.1 200") {
				t.Errorf("redis to a request: %q", got)
			}
		}
	})
}
