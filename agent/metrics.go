package agent

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"ringfence.dev/policy/authz"
)

// counters are the relay's counts by name, as status shows them and metrics
// export them. All of them only grow.
func (a *Agent) counters() map[string]uint64 {
	s := a.relay.Stats()
	return map[string]uint64{
		"accepted_outbound": s.AcceptedOutbound, "accepted_inbound": s.AcceptedInbound,
		"accepted_tunnels": s.AcceptedTunnels, "accepted_streams": s.AcceptedStreams,
		"dialled_tunnels": s.DialledTunnels, "closed": s.Closed, "resets": s.Resets,
		"bytes_up": s.BytesUp, "bytes_down": s.BytesDown,
		"denied": s.Denied, "undecided": s.Undecided, "unidentified": s.Unidentified,
		"failed": s.Failed, "no_origin": s.NoOrigin, "loops": s.Loops, "far_refusals": s.Answers,
		"bad_connects": s.BadConnects, "handshake_errors": s.HandshakeErrors, "tunnel_errors": s.TunnelErrors,
		"probes": s.Probes, "shed": s.Shed, "accept_errors": s.AcceptErrors, "exhausted": s.Exhausted,
		"requests": s.Requests, "requests_denied": s.RequestsDenied, "malformed": s.Malformed,
	}
}

// collector exports what the parts have counted. It reads at each scrape, so
// that nothing is counted twice and no label is resolved on the data path. Every
// label is bounded: by the settings (scopes), or by a fixed list.
type collector struct{ a *Agent }

var (
	descConnections = desc("connections", "Live relayed connections.", "scope", "side", "carrier")
	descEvents      = desc("relay_events_total", "What the relay has counted, by event: connections accepted, denied, failed and so on.", "event")
	descBytes       = desc("relayed_bytes_total", "Bytes relayed, by direction as the client sees it.", "direction")
	descRequests    = desc("http_responses_total", "HTTP responses relayed, by status class.", "class")
	descDecisions   = desc("decisions_total", "Decisions made.", "effect")
	descPolicies    = desc("policies", "Policies in force.")
	descReload      = desc("policy_reload_failures_total", "Policy directories that were not loaded.")
	descStale       = desc("policy_stale", "1 while the policy directory holds something that was not loaded.")
	descLog         = desc("decision_log_records_total", "Decision records, by what became of them.", "state")
	descScopes      = desc("scope_protected", "1 for a scope that enforces and is fully covered.", "scope", "mode")
	descTables      = desc("kernel_table_entries", "Entries of the capture back end's kernel tables.", "table")
	descTunnels     = desc("tunnels", "Outgoing tunnels to other agents.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("ringfence_"+name, help, labels, nil)
}

// Describe implements [prometheus.Collector].
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descConnections, descEvents, descBytes, descRequests, descDecisions, descPolicies,
		descReload, descStale, descLog, descScopes, descTables, descTunnels} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (c collector) Collect(ch chan<- prometheus.Metric) {
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	live := map[[3]string]int{}
	for _, conn := range c.a.relay.Connections() {
		live[[3]string{conn.Scope, conn.Side.String(), string(conn.Carrier)}]++
	}
	for k, n := range live {
		gauge(descConnections, float64(n), k[0], k[1], k[2])
	}
	for name, v := range c.a.counters() {
		switch name {
		case "bytes_up":
			count(descBytes, v, "up")
		case "bytes_down":
			count(descBytes, v, "down")
		default:
			count(descEvents, v, name)
		}
	}
	stats := c.a.relay.Stats()
	for i, class := range []string{"other", "1xx", "2xx", "3xx", "4xx", "5xx"} {
		count(descRequests, stats.Responses[i], class)
	}
	gauge(descTunnels, float64(stats.Tunnels))
	p := c.a.policies.Status()
	count(descDecisions, p.Permits, authz.Permit.String())
	count(descDecisions, p.Denies, authz.Deny.String())
	count(descDecisions, p.WouldDenies, authz.WouldDeny.String())
	gauge(descPolicies, float64(p.Policies))
	count(descReload, p.ReloadFailures)
	gauge(descStale, float64(bit(p.LastError != "")))
	d := c.a.decisions.Status()
	count(descLog, d.Recorded, "recorded")
	count(descLog, d.Written, "written")
	count(descLog, d.Dropped, "dropped")
	for _, sc := range c.a.scopeList() {
		c.a.mu.Lock()
		name, mode := sc.settings.Name, sc.settings.Mode
		c.a.mu.Unlock()
		whole := c.a.protection(context.Background(), sc, verifiedForMetrics).whole
		gauge(descScopes, float64(bit(whole)), name, mode.String())
	}
	for _, t := range c.a.backend.Tables() {
		gauge(descTables, float64(t.Entries), t.Name)
	}
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// metricsHandler serves the agent's own registry, with the Go runtime's and the process's figures.
func (a *Agent) metricsHandler() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collector{a}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 20 * time.Second}))
	return mux
}
