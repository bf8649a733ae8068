package agent

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"ringfence.dev/test/nettest"
)

func TestMetrics(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	web, db := nettest.NetNS(t, "metrics"), nettest.NetNS(t, "metricsdb")
	for _, c := range []ScopeConfig{{Name: "web", NetNS: web.Path, Mode: "enforce"}, {Name: "db", NetNS: db.Path}} {
		if err := addJSON(t, a, c); err != nil {
			t.Fatal(err)
		}
	}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(collector{a})
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	want := `
# HELP ringfence_scope_protected 1 for a scope that enforces and is fully covered.
# TYPE ringfence_scope_protected gauge
ringfence_scope_protected{mode="enforce",scope="web"} 1
ringfence_scope_protected{mode="watch",scope="db"} 0
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "ringfence_scope_protected"); err != nil {
		t.Error(err)
	}
	// The lists that labels are taken from are fixed: nothing that a peer chooses is one.
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	allowed := map[string]bool{"scope": true, "side": true, "carrier": true, "event": true, "direction": true,
		"class": true, "effect": true, "state": true, "mode": true, "table": true}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if !allowed[l.GetName()] {
					t.Errorf("%s has the label %s", f.GetName(), l.GetName())
				}
			}
		}
	}
}

func TestMetricsPage(t *testing.T) {
	a, _ := living(t, settingsIn(t, dir(t), ""))
	h := a.metricsHandler()
	for path, want := range map[string]int{"/metrics": http.StatusOK, "/": http.StatusNotFound, "/debug/pprof/": http.StatusNotFound} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != want {
			t.Errorf("%s: %d", path, w.Code)
		}
		if want == http.StatusOK && !strings.Contains(w.Body.String(), "go_goroutines") {
			t.Errorf("%s lacks the runtime's figures", path)
		}
	}
}

func TestReadiness(t *testing.T) {
	a := New(Settings{}, "test", discard)
	h := a.readinessHandler()
	for _, running := range []bool{false, true} {
		a.running.Store(running)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
		if (w.Code == http.StatusOK) != running {
			t.Errorf("running %v: %d %s", running, w.Code, w.Body)
		}
	}
}
