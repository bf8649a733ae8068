package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"ringfence.dev/tools/ringfence/lab"
)

var destinations = []string{"192.0.2.2", "2001:db8::2"}

// inTunnel fails unless what fn does passes the wire encrypted, and none of the
// secrets in clear.
func (w *world) inTunnel(fn func(), secrets ...string) {
	w.t.Helper()
	wire, err := w.Record("a")
	if err != nil {
		w.t.Fatal(err)
	}
	fn()
	if err := wire.Close(); err != nil {
		w.t.Fatal(err)
	}
	for _, s := range secrets {
		if wire.Saw(s) {
			w.t.Errorf("%q passed the wire in clear", s)
		}
	}
	if wire.TLSRecords() == 0 || wire.Bytes(15008) == 0 {
		w.t.Errorf("no tunnel on the wire: %d TLS records, %d bytes on 15008", wire.TLSRecords(), wire.Bytes(15008))
	}
}

func TestCurl(t *testing.T) {
	program(t, "curl")
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		w.serve("b", "web", 80, helperCommand("web", "[::]:80")...)
		for _, ip := range destinations {
			url := "http://" + bracketed(ip) + "/orders/7?secret=lamps"
			w.inTunnel(func() {
				out, code := w.curl("a", "shop", "--data", "body=chairs", url)
				if code != 0 || !strings.HasSuffix(out, "\n200") {
					t.Fatalf("%s: exit code %d: %s", ip, code, out)
				}
				got := parseSeen(t, out)
				if got.Target != "/orders/7?secret=lamps" || got.Body != int64(len("body=chairs")) {
					t.Errorf("%s: the server saw %+v", ip, got)
				}
				if xfcc := got.Header.Get("X-Forwarded-Client-Cert"); !strings.Contains(xfcc, "URI=spiffe://lab.test/ns/a/sa/shop") {
					t.Errorf("%s: the server was told of its caller: %q", ip, xfcc)
				}
			}, "secret=lamps", "chairs")
		}
	})
}

// A program that was started by other means than the lab's is protected just
// the same, under the name of its executable.
func TestIPNetNSExec(t *testing.T) {
	ip := program(t, "ip", "curl")[0]
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		w.serve("b", "web", 80, helperCommand("web", "192.0.2.2:80")...)
		w.inTunnel(func() {
			out, err := exec.Command(ip, "netns", "exec", "rf-"+labName+"-a", "curl", "-sS", "--max-time", "8", "http://192.0.2.2/secret-path").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "URI=spiffe://lab.test/ns/a/sa/curl") {
				t.Errorf("%v: %s", err, out)
			}
		}, "secret-path")
	})
}

func bracketed(ip string) string {
	if strings.Contains(ip, ":") {
		return "[" + ip + "]"
	}
	return ip
}

// A server that speaks first, and a client that closes its half first.
func TestServerSpeaksFirst(t *testing.T) {
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		w.serve("b", "greeter", 2525, helperCommand("greet", "[::]:2525")...)
		for _, ip := range destinations {
			w.inTunnel(func() {
				out, code := w.feed("HELO there\n", "a", "mailer", helperCommand("talk", bracketed(ip)+":2525", "whole")...)
				if code != 0 || !strings.Contains(out, "HELO there\ngoodbye\n") {
					t.Errorf("%s: exit code %d: %s", ip, code, out)
				}
				// Neither end can tell that anything is in between.
				if !strings.Contains(out, "connected to "+bracketed(ip)+":2525\n") {
					t.Errorf("%s: the client sees another peer: %s", ip, out)
				}
				if w.capture == "ebpf" && !strings.Contains(out, "greetings, client at "+bracketed(clientOf(ip))) {
					t.Errorf("%s: the server sees another client: %s", ip, out)
				}
			}, "HELO there", "goodbye")
		}
	})
}

func clientOf(server string) string {
	v4, v6 := lab.Address("a")
	if strings.Contains(server, ":") {
		return v6.String()
	}
	return v4.String()
}

func TestRedis(t *testing.T) {
	program(t, "redis-server", "redis-cli")
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		w.serve("b", "cache", 6379, "redis-server", "--bind", "192.0.2.2", "2001:db8::2", "--protected-mode", "no",
			"--save", "", "--appendonly", "no", "--dir", w.files)
		for _, ip := range destinations {
			w.inTunnel(func() {
				out, code := w.feed("SET k three-lamps\nGET k\nMULTI\nINCR n\nEXEC\n", "a", "shop", "redis-cli", "-h", ip)
				if code != 0 || !strings.Contains(out, "three-lamps") || !strings.Contains(out, "QUEUED") {
					t.Errorf("%s: exit code %d: %s", ip, code, out)
				}
			}, "three-lamps")
		}
	})
}

func TestPostgreSQL(t *testing.T) {
	program(t, "psql", "setpriv")
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(bins) == 0 {
		program(t, "postgres")
		return
	}
	bin := bins[len(bins)-1]
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		// PostgreSQL refuses to run as root, and its user must reach its files.
		dir, err := os.MkdirTemp("", "ringfence-e2e-pg")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if err := os.Chown(dir, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		nobody := []string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"}
		init := append(nobody, filepath.Join(bin, "initdb"), "-D", dir+"/data", "-U", "shop", "-A", "trust", "--no-sync")
		if out, err := exec.Command(init[0], init[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("initdb: %v: %s", err, out)
		}
		hba := "host all all 192.0.2.0/24 trust\nhost all all 2001:db8::/64 trust\nhost all all 127.0.0.1/32 trust\nhost all all ::1/128 trust\n"
		if err := os.WriteFile(dir+"/data/pg_hba.conf", []byte(hba), 0o644); err != nil {
			t.Fatal(err)
		}
		w.serve("b", "database", 5432, append(nobody, filepath.Join(bin, "postgres"), "-D", dir+"/data",
			"-c", "listen_addresses=192.0.2.2,2001:db8::2", "-c", "unix_socket_directories=", "-c", "fsync=off")...)
		for _, ip := range destinations {
			w.inTunnel(func() {
				out, code := w.run("a", "shop", "psql", "-h", ip, "-U", "shop", "-At", "-c", "select 'three' || '-lamps', count(*) from generate_series(1,100000)", "postgres")
				if code != 0 || out != "three-lamps|100000\n" {
					t.Errorf("%s: exit code %d: %s", ip, code, out)
				}
			}, "three-lamps")
		}
	})
}

func TestSSH(t *testing.T) {
	sshd := program(t, "sshd", "ssh", "ssh-keygen")[0]
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		for _, key := range []string{"host", "user"} {
			if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(w.files, key)).CombinedOutput(); err != nil {
				t.Fatalf("ssh-keygen: %v: %s", err, out)
			}
		}
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // where sshd separates its privileges
			t.Fatal(err)
		}
		w.serve("b", "sshd", 22, sshd, "-D", "-e", "-f", "/dev/null", "-o", "ListenAddress=192.0.2.2", "-o", "ListenAddress=2001:db8::2",
			"-h", filepath.Join(w.files, "host"), "-o", "AuthorizedKeysFile="+filepath.Join(w.files, "user.pub"),
			"-o", "StrictModes=no", "-o", "PermitRootLogin=yes", "-o", "PidFile=none")
		for _, ip := range destinations {
			w.inTunnel(func() {
				out, code := w.run("a", "admin", "ssh", "-F", "none", "-i", filepath.Join(w.files, "user"), "-o", "StrictHostKeyChecking=no",
					"-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=8", "root@"+ip, "echo over; echo $SSH_CONNECTION; exit 3")
				if code != 3 || !strings.HasPrefix(out, "over\n") {
					t.Errorf("%s: exit code %d: %s", ip, code, out)
				}
			}, "SSH-2.0-")
		}
	})
}

func TestWrk(t *testing.T) {
	program(t, "wrk", "nginx")
	forEachCapture(t, lab.Options{}, func(t *testing.T, w *world) {
		w.nginx("b", "web", "80")
		for _, ip := range destinations {
			for _, header := range []string{"X-Kept: alive", "Connection: close"} {
				w.inTunnel(func() {
					out, code := w.run("a", "loader", "wrk", "-t1", "-c16", "-d1s", "-H", header, "http://"+bracketed(ip)+"/")
					if code != 0 || strings.Contains(out, "Socket errors") || strings.Contains(out, "Non-2xx") || completed(out) == 0 {
						t.Errorf("%s, %s: exit code %d: %s", ip, header, code, out)
					}
				}, "hello from nginx")
			}
		}
	})
}

// completed reads the number of requests from wrk's report.
func completed(report string) (n int) {
	for line := range strings.Lines(report) {
		if count, _, ok := strings.Cut(strings.TrimSpace(line), " requests in "); ok {
			n, _ = strconv.Atoi(count)
		}
	}
	return n
}

// nginx serves one small answer on all addresses of a host.
func (w *world) nginx(host, unit, port string) {
	w.t.Helper()
	conf := filepath.Join(w.files, unit+".conf")
	text := fmt.Sprintf(`daemon off; user root; worker_processes 1; pid %[1]s/pid; error_log stderr crit; events {}
http { access_log off; client_body_temp_path %[1]s/1; proxy_temp_path %[1]s/2; fastcgi_temp_path %[1]s/3;
uwsgi_temp_path %[1]s/4; scgi_temp_path %[1]s/5;
server { listen %[2]s backlog=4096; listen [::]:%[2]s backlog=4096; location / { return 200 "hello from nginx\n"; } } }
`, w.files, port)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		w.t.Fatal(err)
	}
	w.serve(host, unit, uint16(n), program(w.t, "nginx")[0], "-p", w.files, "-c", conf)
}
