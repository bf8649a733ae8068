package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// peer is one way of getting from the client to the origin.
type peer struct {
	name string
	// program is what must be installed.
	program string
	// capture is the lab's: off for peers that need no agent.
	capture string
	// configure writes the pair's settings and returns the two commands; nil
	// where nothing but the lab is started.
	configure func(dir string) (a, b *exec.Cmd, err error)
	// target is what the client dials: the origin itself where traffic is
	// captured, the near proxy where it must be addressed.
	target string
	// loads limits the peer to some loads; nil means all.
	loads map[string]bool
}

func (p peer) String() string { return p.name }

func (p peer) runs(l load) bool { return p.loads == nil || p.loads[l.name] }

// secure reports whether the peer encrypts and adds a header.
func (p peer) secure() bool { return p.name != "direct" }

const (
	originURL = "http://192.0.2.2:80"
	nearURL   = "http://127.0.0.1:8080"
)

var allPeers = []peer{
	{name: "direct", program: "nginx", capture: "off", target: originURL},
	{name: "haproxy", program: "haproxy", capture: "off", target: nearURL, configure: haproxyPair(reuse)},
	{name: "haproxy-noreuse", program: "haproxy", capture: "off", target: nearURL, configure: haproxyPair(noReuse),
		loads: map[string]bool{"close": true}},
	{name: "nginx", program: "nginx", capture: "off", target: nearURL, configure: nginxPair},
	{name: "ringfence-ebpf", program: "ringfence", capture: "ebpf", target: originURL},
	{name: "ringfence-iptables", program: "ringfence", capture: "iptables", target: originURL},
}

// With re-use, a connection of the far proxy to the origin serves many clients'
// requests. Without, the origin sees a connection per request, which is what a
// transparent proxy must give it when the client opens one per request.
const (
	reuse   = "http-reuse always"
	noReuse = "http-reuse never\n    option http-server-close"
)

// Both proxies offer AES-128-GCM alone, the cheapest of TLS 1.3 here and the
// one that ringfence's TLS picks first.
const haproxyCommon = `global
    nbthread 1
    maxconn 4000
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
    ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
    mode http
    option http-keep-alive
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    maxconn 4000
`

const haproxyNear = haproxyCommon + `frontend near
    bind 127.0.0.1:8080
    default_backend far
backend far
    http-reuse always
    server far 192.0.2.2:8443 ssl crt a.pem ca-file ca.pem verify required ssl-min-ver TLSv1.3 alpn http/1.1
`

const haproxyFar = haproxyCommon + `frontend far
    bind 192.0.2.2:8443 ssl crt b.pem ca-file ca.pem verify required ssl-min-ver TLSv1.3 alpn http/1.1
    http-request set-header X-Forwarded-Client-Cert Subject=%%{+Q}[ssl_c_s_dn]
    default_backend origin
backend origin
    %s
    server origin 192.0.2.2:80
`

func haproxyPair(towardOrigin string) func(string) (*exec.Cmd, *exec.Cmd, error) {
	return func(dir string) (a, b *exec.Cmd, err error) {
		if err := writeFiles(dir, map[string]string{
			"near.cfg": haproxyNear, "far.cfg": fmt.Sprintf(haproxyFar, towardOrigin),
		}); err != nil {
			return nil, nil, err
		}
		// -db keeps it one process in the foreground.
		a, b = exec.Command("haproxy", "-db", "-f", "near.cfg"), exec.Command("haproxy", "-db", "-f", "far.cfg")
		a.Dir, b.Dir = dir, dir
		return a, b, nil
	}
}

// The workers keep root's uid, because the lab's directory is root's alone.
const nginxCommon = `daemon off;
user root;
worker_processes 1;
error_log stderr crit;
pid %[1]s.pid;
events { worker_connections 8000; }
http {
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 600s;
    client_body_temp_path %[1]s-body; proxy_temp_path %[1]s-proxy;
    fastcgi_temp_path %[1]s-1; uwsgi_temp_path %[1]s-2; scgi_temp_path %[1]s-3;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_buffering on;
    proxy_max_temp_file_size 0;
    %[2]s
}
`

const nginxNear = `upstream far { server 192.0.2.2:8443; keepalive 512; keepalive_requests 1000000000; }
    server {
        listen 127.0.0.1:8080 backlog=4096;
        location / {
            proxy_pass https://far;
            proxy_ssl_certificate a.pem; proxy_ssl_certificate_key a.pem;
            proxy_ssl_trusted_certificate ca.pem; proxy_ssl_verify on; proxy_ssl_name b.bench.test;
            proxy_ssl_protocols TLSv1.3; proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
            proxy_ssl_session_reuse on;
        }
    }`

const nginxFar = `upstream origin { server 192.0.2.2:80; keepalive 512; keepalive_requests 1000000000; }
    server {
        listen 192.0.2.2:8443 ssl backlog=4096;
        ssl_certificate b.pem; ssl_certificate_key b.pem;
        ssl_client_certificate ca.pem; ssl_verify_client on;
        location / {
            proxy_pass http://origin;
            # Said again, because one header set here drops those that are inherited.
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-Client-Cert "Subject=\"$ssl_client_s_dn\"";
        }
    }`

func nginxPair(dir string) (a, b *exec.Cmd, err error) {
	near, far := fmt.Sprintf(nginxCommon, "near", nginxNear), fmt.Sprintf(nginxCommon, "far", nginxFar)
	if err := writeFiles(dir, map[string]string{"near.conf": near, "far.conf": far}); err != nil {
		return nil, nil, err
	}
	return nginx(dir, "near.conf"), nginx(dir, "far.conf"), nil
}

func nginx(dir, conf string) *exec.Cmd {
	cmd := exec.Command("nginx", "-p", dir, "-c", conf)
	cmd.Dir = dir
	return cmd
}

// bodySize is the size of the large response.
const bodySize = 1 << 20

// The origin answers small requests from memory, and large ones from a file in
// memory. /seen tells which header the far proxy added.
const originServer = `sendfile on;
    server {
        listen 192.0.2.2:80 backlog=4096;
        location / { return 200 "{\"id\":7,\"name\":\"a small answer\",\"state\":\"ready\",\"tags\":[\"static\",\"one hundred bytes or so\"]}\n"; }
        location /big { root .; }
        location /seen { return 200 "$http_x_forwarded_client_cert"; }
    }`

func originCommand(dir string) (*exec.Cmd, error) {
	err := writeFiles(dir, map[string]string{
		"origin.conf": fmt.Sprintf(nginxCommon, "origin", originServer),
		"big":         string(make([]byte, bodySize)),
	})
	return nginx(dir, "origin.conf"), err
}

func writeFiles(dir string, files map[string]string) error {
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// startPair runs the peer's two proxies, if it has any besides the lab's agents.
func (a *arena) startPair(ctx context.Context, p peer) error {
	if p.configure == nil {
		return nil
	}
	if err := writePKI(a.dir); err != nil {
		return err
	}
	near, far, err := p.configure(a.dir)
	if err != nil {
		return err
	}
	// The far one first: some proxies give up on a peer that is not there.
	if err := a.start("b", "far", far); err != nil {
		return err
	}
	if err := a.lab.WaitListening(ctx, "b", 8443); err != nil {
		return err
	}
	if err := a.start("a", "near", near); err != nil {
		return err
	}
	a.proxies = []int{far.Process.Pid, near.Process.Pid}
	return a.lab.WaitListening(ctx, "a", 8080)
}
