package traffic_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"ringfence.dev/tools/ringfence/lab"
)

// freeAddress is a loopback address that nobody listens on at this moment.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func fetch(t *testing.T, url string) (status int, body string) {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

var sample = regexp.MustCompile(`(?m)^([a-z_]+(?:\{[^}]*\})?) [^ ]+$`)

// Metrics can be read by Prometheus, and no client can make them grow.
func TestMetricsAndReadiness(t *testing.T) {
	forEachShop(t, lab.Options{}, func(t *testing.T, w *shopWorld) {
		metrics, ready := freeAddress(t), freeAddress(t)
		w.Configure("b", func(s map[string]any) {
			s["metrics"], s["readiness"] = map[string]string{"listen": metrics}, map[string]string{"listen": ready}
		})
		if err := w.Restart(t.Context(), "b"); err != nil {
			t.Fatal(err)
		}
		if status, body := fetch(t, "http://"+ready+"/"); status != 200 {
			t.Errorf("readiness: status %d: %s", status, body)
		}
		traffic := func(round int) {
			for i := range 20 {
				e := dial(t, w.shop, "192.0.2.2:80")
				e.Send(fmt.Sprintf("GET /path-%d-%d HTTP/1.1\r\nHost: host-%d-%d\r\nUser-Agent: agent-%d\r\n\r\n", round, i, round, i, i))
				e.status(200)
				e.Send(fmt.Sprintf("METHOD%d%d /admin HTTP/1.1\r\nHost: web\r\n\r\n", round, i))
				e.status(403)
				_ = e.Close()
			}
			w.refused(t, "not HTTP", "\r\n\r\n")
		}
		series := func() (all []string) {
			t.Helper()
			status, body := fetch(t, "http://"+metrics+"/metrics")
			if status != 200 {
				t.Fatalf("metrics: status %d", status)
			}
			problems, err := promlint.New(strings.NewReader(body)).Lint()
			if err != nil || len(problems) > 0 {
				t.Errorf("metrics: %v, %+v", err, problems)
			}
			for _, m := range sample.FindAllStringSubmatch(body, -1) {
				// There only while there is such a connection.
				if strings.HasPrefix(m[1], "ringfence_") && m[1] != `ringfence_connections{carrier="tunnel",scope="b",side="ingress"}` {
					all = append(all, m[1])
				}
			}
			for _, foreign := range []string{"path-", "host-", "agent-", "METHOD", "spiffe://", "192.0.2."} {
				if strings.Contains(body, foreign) {
					t.Errorf("metrics show %q", foreign)
				}
			}
			return all
		}
		traffic(1)
		before := series()
		traffic(2)
		if after := series(); !slices.Equal(before, after) || len(after) < 10 {
			t.Errorf("traffic made series:\n%q\nwere\n%q", after, before)
		}
		for _, want := range []string{`ringfence_decisions_total{effect="deny"}`, `ringfence_decisions_total{effect="permit"}`, `ringfence_http_responses_total{class="2xx"}`} {
			if !slices.Contains(before, want) {
				t.Errorf("no series %s among %q", want, before)
			}
		}
		if s := w.Status("b"); s.Counters["requests"] < 80 || s.Counters["requests_denied"] < 40 || s.Decisions.Deny < 40 {
			t.Errorf("status counts %+v, %+v", s.Counters, s.Decisions)
		}
	})
}
