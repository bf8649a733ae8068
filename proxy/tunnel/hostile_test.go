package tunnel_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"ringfence.dev/proxy/proxytest"
	"ringfence.dev/proxy/tunnel"
)

// handshake tries a tunnel with certificates and trust of the test's choice.
func handshake(t *testing.T, ca *proxytest.CA, client, server *tls.Certificate) (clientErr, serverErr error) {
	t.Helper()
	ca.Use(serverID, server)
	cs, ss := sockets(t)
	s := newServer()
	s.serve(t, ss, ca)
	c, err := tunnel.Client(cs, tunnel.ClientConfig{
		Certificate: client, Verify: ca.Verify, Port: 80, Deadline: time.Now().Add(patience),
	})
	if err != nil {
		<-s.down
		return err, s.err
	}
	// In TLS 1.3 the client learns last that it is not welcome.
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run() }()
	select {
	case <-c.Ready():
	case <-c.Done():
		clientErr = c.Err()
	}
	c.Close()
	<-done
	<-s.down
	return clientErr, s.err
}

func TestCertificatesAreJudged(t *testing.T) {
	ca, foreign := proxytest.NewCA(t, "lab.test"), proxytest.NewCA(t, "lab.test")
	other := proxytest.NewCA(t, "other.test")
	good := proxytest.Leaf{ID: serverID.String()}
	leaf := func(change func(*proxytest.Leaf)) *tls.Certificate {
		l := good
		change(&l)
		return ca.Issue(l)
	}
	bad := map[string]*tls.Certificate{
		"expired":         leaf(func(l *proxytest.Leaf) { l.ExpiresIn = -time.Minute }),
		"no SPIFFE ID":    leaf(func(l *proxytest.Leaf) { l.NoURI = true }),
		"for neither use": leaf(func(l *proxytest.Leaf) { l.Usage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }),
		"wrong authority": foreign.Issue(good),
		"foreign domain":  other.Issue(proxytest.Leaf{ID: "spiffe://other.test/ns/b/sa/server"}),
	}
	ok := ca.Issue(good)
	for name, cert := range bad {
		t.Run("server "+name, func(t *testing.T) {
			if err, _ := handshake(t, ca, ok, cert); !errors.Is(err, tunnel.ErrIdentity) {
				t.Errorf("client accepts it: %v", err)
			}
		})
		t.Run("client "+name, func(t *testing.T) {
			clientErr, serverErr := handshake(t, ca, cert, ok)
			if !errors.Is(serverErr, tunnel.ErrIdentity) || clientErr == nil {
				t.Errorf("server accepts it: %v, client sees %v", serverErr, clientErr)
			}
		})
	}
	if clientErr, serverErr := handshake(t, ca, ok, ok); clientErr != nil || serverErr != nil {
		t.Errorf("a good pair: %v, %v", clientErr, serverErr)
	}
}

func TestTLSIsExact(t *testing.T) {
	ca := proxytest.NewCA(t, "lab.test")
	cert := ca.Issue(proxytest.Leaf{})
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2":        func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"no ALPN":        func(c *tls.Config) { c.NextProtos = nil },
		"http/1.1 only":  func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} },
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
		"self-made identity": func(c *tls.Config) {
			c.Certificates = []tls.Certificate{*proxytest.NewCA(t, "lab.test").Issue(proxytest.Leaf{})}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, ss := netPair(t)
			defer c.Close()
			s := newServer()
			s.serve(t, adopt(t, ss), ca)
			cfg := &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}, InsecureSkipVerify: true}
			change(cfg)
			conn := tls.Client(c, cfg)
			if conn.Handshake() == nil {
				_, _ = io.Copy(io.Discard, conn)
			}
			<-s.down
			if s.err == nil {
				t.Error("accepted")
			}
		})
	}
}

// No resumption: a ticket would carry an identity past its certificate's end.
func TestNoSessionTickets(t *testing.T) {
	r := rawClient(t, newServer())
	r.until("settings", func(f http2.Frame) bool { return f.Header().Type == http2.FrameSettings })
	cs := r.ConnectionState()
	if cs.DidResume || cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" {
		t.Errorf("state = %+v", cs)
	}
}

func TestPlainClientsGetACleanEnd(t *testing.T) {
	ca := proxytest.NewCA(t, "lab.test")
	for name, text := range map[string]string{
		"HTTP/1.1": "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"h2c":      http2.ClientPreface,
		"garbage":  strings.Repeat("\xff", 100),
		"nothing":  "",
	} {
		t.Run(name, func(t *testing.T) {
			c, ss := netPair(t)
			s := newServer()
			s.serve(t, adopt(t, ss), ca)
			_, _ = io.WriteString(c, text)
			_ = c.CloseWrite()
			answer, _ := io.ReadAll(c) // an alert, or a reset
			if len(answer) > 64 || bytes.Contains(answer, []byte("HTTP/")) {
				t.Errorf("answered %q", answer)
			}
			<-s.down
			if s.err == nil {
				t.Error("accepted")
			}
			c.Close()
		})
	}
}

func TestServerNames(t *testing.T) {
	if got := tunnel.ServerName(8080); got != "p8080.ringfence.internal" {
		t.Errorf("ServerName = %q", got)
	}
}

// Each of these breaks the protocol so that nothing can be repaired: the
// connection ends with the right code (RFC 9113).
func TestConnectionErrors(t *testing.T) {
	frame := func(typ http2.FrameType, flags http2.Flags, stream uint32, payload ...byte) func(r *raw) error {
		return func(r *raw) error { return r.fr.WriteRawFrame(typ, flags, stream, payload) }
	}
	for name, c := range map[string]struct {
		code http2.ErrCode
		send func(r *raw) error
	}{
		"5.1.1 even stream":             {http2.ErrCodeProtocol, func(r *raw) error { return r.connect(2) }},
		"6.1 DATA on the connection":    {http2.ErrCodeProtocol, frame(http2.FrameData, 0, 0, 1)},
		"5.1 DATA on an idle stream":    {http2.ErrCodeProtocol, frame(http2.FrameData, 0, 7, 1)},
		"6.1 padding past the frame":    {http2.ErrCodeProtocol, paddedPastEnd},
		"6.1 padded and empty":          {http2.ErrCodeProtocol, frame(http2.FrameData, http2.FlagDataPadded, 1)},
		"6.2 HEADERS on the connection": {http2.ErrCodeProtocol, frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 0, 0x82)},
		"6.2 padding past the block":    {http2.ErrCodeProtocol, frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersPadded, 1, 9, 0x82)},
		"6.2 cut priority":              {http2.ErrCodeProtocol, frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersPriority, 1, 0, 0)},
		"6.4 RST on the connection":     {http2.ErrCodeProtocol, frame(http2.FrameRSTStream, 0, 0, 0, 0, 0, 8)},
		"5.1 RST of an idle stream":     {http2.ErrCodeProtocol, frame(http2.FrameRSTStream, 0, 9, 0, 0, 0, 8)},
		"6.4 short RST":                 {http2.ErrCodeFrameSize, frame(http2.FrameRSTStream, 0, 1, 0)},
		"6.5 SETTINGS on a stream":      {http2.ErrCodeFrameSize, frame(http2.FrameSettings, 0, 1)},
		"6.5 cut SETTINGS":              {http2.ErrCodeFrameSize, frame(http2.FrameSettings, 0, 0, 0, 1, 2)},
		"6.5 ACK with content":          {http2.ErrCodeFrameSize, frame(http2.FrameSettings, http2.FlagSettingsAck, 0, 0, 1, 0, 0, 0, 0)},
		"6.5.2 window past 2^31-1":      {http2.ErrCodeFlowControl, setting(http2.SettingInitialWindowSize, 1<<31)},
		"6.5.2 frame size too small":    {http2.ErrCodeProtocol, setting(http2.SettingMaxFrameSize, 1)},
		"6.5.2 push neither 0 nor 1":    {http2.ErrCodeProtocol, setting(http2.SettingEnablePush, 2)},
		"6.6 PUSH_PROMISE":              {http2.ErrCodeProtocol, frame(http2.FramePushPromise, 4, 1, 0, 0, 0, 2)},
		"6.7 PING on a stream":          {http2.ErrCodeProtocol, frame(http2.FramePing, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)},
		"6.7 short PING":                {http2.ErrCodeFrameSize, frame(http2.FramePing, 0, 0, 1)},
		"6.8 short GOAWAY":              {http2.ErrCodeFrameSize, frame(http2.FrameGoAway, 0, 0, 1)},
		"6.9 zero increment":            {http2.ErrCodeFlowControl, frame(http2.FrameWindowUpdate, 0, 0, 0, 0, 0, 0)},
		"6.9 short":                     {http2.ErrCodeFrameSize, frame(http2.FrameWindowUpdate, 0, 0, 1)},
		"6.9.1 connection overflow":     {http2.ErrCodeFlowControl, frame(http2.FrameWindowUpdate, 0, 0, 0x7f, 0xff, 0xff, 0xff)},
		"5.1 WINDOW_UPDATE when idle":   {http2.ErrCodeProtocol, frame(http2.FrameWindowUpdate, 0, 5, 0, 0, 0, 1)},
		"6.10 lone CONTINUATION":        {http2.ErrCodeProtocol, frame(http2.FrameContinuation, 4, 1, 0x82)},
		"6.10 interrupted block":        {http2.ErrCodeProtocol, interrupted},
		"4.2 oversized frame":           {http2.ErrCodeFrameSize, oversized},
		"4.3 bad compression":           {http2.ErrCodeCompression, frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)},
		"CONTINUATION flood":            {http2.ErrCodeEnhanceYourCalm, continuationFlood},
		"header field without end":      {http2.ErrCodeEnhanceYourCalm, hugeField},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer()
			r := rawClient(t, s)
			sent := c.send(r)
			<-s.down
			var ce *tunnel.ConnError
			if !errors.As(s.err, &ce) || ce.Code != c.code {
				t.Errorf("ended with %v, want %v", s.err, c.code)
			}
			if sent == nil {
				r.wantGoAway(c.code)
			}
		})
	}
}

func setting(id http2.SettingID, v uint32) func(r *raw) error {
	return func(r *raw) error {
		p := binary.BigEndian.AppendUint16(nil, uint16(id))
		return r.fr.WriteRawFrame(http2.FrameSettings, 0, 0, binary.BigEndian.AppendUint32(p, v))
	}
}

func paddedPastEnd(r *raw) error {
	return errors.Join(r.connect(1), r.fr.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{5, 1, 2}))
}

func interrupted(r *raw) error {
	b := r.block(":method", "CONNECT")
	return errors.Join(
		r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b}),
		r.fr.WritePing(false, [8]byte{}))
}

func oversized(r *raw) error {
	_, err := r.Conn.Write([]byte{0xff, 0xff, 0xff, byte(http2.FrameHeaders), 0, 0, 0, 0, 1})
	return err
}

func continuationFlood(r *raw) error {
	err := r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(":method", "CONNECT")})
	for range 20 {
		err = errors.Join(err, r.fr.WriteContinuation(1, false, nil))
	}
	return err
}

func hugeField(r *raw) error {
	b := r.block(":method", "CONNECT", "x", strings.Repeat("v", 40_000))
	err := r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:10_000]})
	for b = b[10_000:]; len(b) > 0; b = b[min(len(b), 10_000):] {
		err = errors.Join(err, r.fr.WriteContinuation(1, len(b) <= 10_000, b[:min(len(b), 10_000)]))
	}
	return err
}

func TestNotHTTP2InsideTLS(t *testing.T) {
	ca := proxytest.NewCA(t, "lab.test")
	c, ss := netPair(t)
	defer c.Close()
	s := newServer()
	s.serve(t, adopt(t, ss), ca)
	cert, _ := ca.Certificate(context.Background(), clientID)
	conn := tls.Client(c, &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}, InsecureSkipVerify: true})
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-s.down
	var ce *tunnel.ConnError
	if !errors.As(s.err, &ce) || ce.Code != http2.ErrCodeProtocol {
		t.Errorf("ended with %v", s.err)
	}
}

func TestFloods(t *testing.T) {
	for name, send := range map[string]func(r *raw) error{
		"SETTINGS": func(r *raw) error { return r.fr.WriteSettings() },
		"PING":     func(r *raw) error { return r.fr.WritePing(false, [8]byte{1}) },
		"empty DATA": func(r *raw) error {
			return r.fr.WriteData(1, false, nil)
		},
		"unknown frames": func(r *raw) error { return r.fr.WriteRawFrame(0xfa, 0, 0, nil) },
		"PRIORITY":       func(r *raw) error { return r.fr.WritePriority(1, http2.PriorityParam{}) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer()
			r := rawClient(t, s)
			r.must(r.connect(1))
			go func() { _, _ = io.Copy(io.Discard, r.Conn) }()
			for range 30_000 {
				if send(r) != nil {
					break
				}
			}
			select {
			case <-s.down:
			case <-time.After(patience):
				t.Fatal("the flood goes on")
			}
			var ce *tunnel.ConnError
			if !errors.As(s.err, &ce) || ce.Code != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("ended with %v", s.err)
			}
		})
	}
}

// Opening and resetting streams does not get a peer more work done at once than
// the streams it may have (CVE-2023-44487).
func TestRapidReset(t *testing.T) {
	s := newServer()
	release := make(chan struct{})
	s.accept = func(st *tunnel.Stream, _ *tunnel.Request, _ *sink) {
		<-release
		st.Respond(200)
		st.Close()
	}
	r := rawClient(t, s)
	go func() { _, _ = io.Copy(io.Discard, r.Conn) }()
	for id := uint32(1); id < 8000; id += 2 {
		if r.connect(id) != nil || r.fr.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
			break
		}
	}
	<-s.down
	s.mu.Lock()
	n := len(s.streams)
	s.mu.Unlock()
	close(release)
	if n > 128 {
		t.Errorf("%d streams were worked on", n)
	}
	var ce *tunnel.ConnError
	if !errors.As(s.err, &ce) || ce.Code != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("ended with %v", s.err)
	}
}

// A peer that makes us answer and never reads is cut off before the answers pile up.
func TestPeerThatDoesNotRead(t *testing.T) {
	s := newServer()
	s.accept = func(st *tunnel.Stream, _ *tunnel.Request, _ *sink) { st.Respond(400); st.Close() }
	r := rawClient(t, s)
	_ = r.SetWriteDeadline(time.Now().Add(patience))
	for id := uint32(1); ; id += 2 {
		if id > 4_000_000 {
			t.Fatal("served for ever without being read")
		}
		if r.connect(id) != nil {
			break
		}
	}
	r.Close()
	<-s.down
}

func TestStreamErrorsStayOnTheirStream(t *testing.T) {
	const connect, authority = "CONNECT", "127.0.0.1:80"
	for name, send := range map[string]func(r *raw) error{
		"8.3 unknown pseudo-header":  func(r *raw) error { return r.headers(1, false, ":method", connect, ":authority", authority, ":x", "y") },
		"8.3 repeated pseudo-header": func(r *raw) error { return r.headers(1, false, ":method", connect, ":method", connect) },
		"8.3 pseudo-header after others": func(r *raw) error {
			return r.headers(1, false, ":method", connect, "x", "y", ":authority", authority)
		},
		"8.2.2 connection header": func(r *raw) error {
			return r.headers(1, false, ":method", connect, ":authority", authority, "connection", "close")
		},
		"repeated decision": func(r *raw) error {
			return r.headers(1, false, ":method", connect, ":authority", authority, "ringfence-decision", "a", "ringfence-decision", "b")
		},
		"6.5.2 header list": func(r *raw) error {
			pairs := []string{":method", connect, ":authority", authority}
			for range 400 {
				pairs = append(pairs, "x-filler", strings.Repeat("v", 20))
			}
			return r.headers(1, false, pairs...)
		},
		"6.9.1 stream window overflow": func(r *raw) error {
			return errors.Join(r.connect(1), r.fr.WriteWindowUpdate(1, 1<<31-1))
		},
		"6.9 zero increment": func(r *raw) error {
			return errors.Join(r.connect(1), r.fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 1, make([]byte, 4)))
		},
		"8.1 trailers without end": func(r *raw) error { return errors.Join(r.connect(1), r.headers(1, false, "x", "y")) },
		"5.1 DATA after the end": func(r *raw) error {
			return errors.Join(r.connect(1), r.fr.WriteData(1, true, nil), r.fr.WriteData(1, false, []byte("x")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := rawClient(t, newServer())
			r.must(send(r))
			r.until("the reset", isReset(1))
			r.must(r.connect(3))
			r.until("a neighbour's answer", isStatus(3, "200"))
		})
	}
}

// A stream's credit is what it is: octets beyond it end the stream.
func TestRFC9113_6_9_1_StreamWindowOverrun(t *testing.T) {
	s := newServer()
	s.accept = func(st *tunnel.Stream, _ *tunnel.Request, k *sink) {
		k.mu.Lock()
		k.stalled, k.discard = true, true
		k.mu.Unlock()
		st.Respond(200)
	}
	r := rawClient(t, s)
	r.must(r.connect(1))
	r.until("the answer", isStatus(1, "200"))
	for range 5 {
		r.must(r.fr.WriteData(1, false, make([]byte, 60_000)))
	}
	f := r.until("the reset", isReset(1)).(*http2.RSTStreamFrame)
	if f.ErrCode != http2.ErrCodeFlowControl {
		t.Errorf("reset with %v", f.ErrCode)
	}
	r.must(r.connect(3))
	r.until("a neighbour's answer", isStatus(3, "200"))
}

func TestNotConnectIsShownToTheHandler(t *testing.T) {
	s := newServer()
	s.accept = func(st *tunnel.Stream, r *tunnel.Request, _ *sink) {
		if r.Connect() {
			st.Respond(http.StatusOK)
			return
		}
		st.Respond(http.StatusBadRequest)
		st.Close()
	}
	r := rawClient(t, s)
	r.must(r.headers(1, true, ":method", "GET", ":scheme", "https", ":path", "/", ":authority", "x"))
	r.until("400", isStatus(1, "400"))
	r.must(r.headers(3, false, ":method", "CONNECT", ":authority", "x:80", ":protocol", "websocket", ":scheme", "https", ":path", "/"))
	r.until("400", isStatus(3, "400"))
	r.must(r.connect(5))
	r.until("200", isStatus(5, "200"))
}

// Padded DATA, priority in HEADERS, trailers, interim answers, unknown settings
// and frames are all legitimate.
func TestForeignHabits(t *testing.T) {
	s := newServer()
	r := rawClient(t, s)
	r.must(r.fr.WriteSettings(http2.Setting{ID: 0x99, Val: 1}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0}))
	r.must(r.fr.WriteRawFrame(0xfa, 0xff, 77, []byte("grease")))
	r.must(r.fr.WriteHeaders(http2.HeadersFrameParam{
		StreamID: 1, EndHeaders: true, PadLength: 9, Priority: http2.PriorityParam{StreamDep: 3, Weight: 7},
		BlockFragment: r.block(":method", "CONNECT", ":authority", "[::1]:80", "baggage", "k8s.cluster.name=c", "accept", "*/*"),
	}))
	r.until("the answer", isStatus(1, "200"))
	r.must(r.fr.WriteDataPadded(1, false, []byte("hel"), make([]byte, 200)))
	r.must(r.fr.WriteDataPadded(1, false, nil, make([]byte, 255)))
	r.must(r.fr.WriteData(1, false, []byte("lo")))
	r.must(r.headers(1, true, "x-trailer", "y"))
	_, k := s.at(0)
	k.wait(t, "the end", func() bool { return k.ended })
	if k.data.String() != "hello" {
		t.Errorf("got %q", k.data.String())
	}
	if got := s.request(0); got.Authority != "[::1]:80" || got.Baggage != "k8s.cluster.name=c" {
		t.Errorf("request = %+v", got)
	}
	if s.Unread() != 0 {
		t.Errorf("padding was not credited: %d", s.Unread())
	}
}

func TestForeignServer(t *testing.T) {
	// ztunnel's figures, and a server that grants credit late.
	r, c := rawServer(t, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20}, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
	if err := c.Reserve(100); err != nil {
		t.Fatal(err)
	}
	if err := c.Reserve(100); !errors.Is(err, tunnel.ErrBusy) {
		t.Errorf("a second stream where the peer allows one: %v", err)
	}
	k := newSink()
	st, err := c.Open(&tunnel.Request{Authority: "127.0.0.1:80"}, k)
	if err != nil {
		t.Fatal(err)
	}
	k.setStream(st)
	h := r.until("the CONNECT", func(f http2.Frame) bool { _, ok := f.(*http2.MetaHeadersFrame); return ok }).(*http2.MetaHeadersFrame)
	if h.PseudoValue("method") != "CONNECT" || h.PseudoValue("authority") != "127.0.0.1:80" || len(h.RegularFields()) != 0 {
		t.Errorf("fields = %v", h.Fields)
	}
	r.must(r.headers(1, false, ":status", "103"))
	r.must(r.headers(1, false, ":status", "200"))
	k.wait(t, "the answer", func() bool { return k.status == 200 })
	wrote := make(chan error, 1)
	go func() { wrote <- st.WriteAll([][]byte{[]byte("0123456789abcdefghij")}) }()
	var got bytes.Buffer
	data := func(f http2.Frame) bool {
		d, ok := f.(*http2.DataFrame)
		if ok {
			got.Write(d.Data())
		}
		return ok
	}
	r.until("what the credit allows", data)
	if got.String() != "0123456789" {
		t.Errorf("sent %q on a credit of ten", got.String())
	}
	r.must(r.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 15}))
	r.until("five more", data)
	r.must(r.fr.WriteWindowUpdate(1, 100))
	r.until("the rest", data)
	if err := <-wrote; err != nil || got.String() != "0123456789abcdefghij" {
		t.Errorf("sent %q, %v", got.String(), err)
	}
	st.Close()
	r.until("the reset", isReset(1))
}

// Data before the answer to a CONNECT is the server's fault, on that stream.
func TestDataBeforeTheAnswer(t *testing.T) {
	r, c := rawServer(t)
	if err := c.Reserve(100); err != nil {
		t.Fatal(err)
	}
	k := newSink()
	st, err := c.Open(&tunnel.Request{Authority: "127.0.0.1:80"}, k)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	r.until("the CONNECT", func(f http2.Frame) bool { return f.Header().Type == http2.FrameHeaders })
	r.must(r.fr.WriteData(1, false, []byte("early")))
	r.until("the reset", isReset(1))
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.count != 0 {
		t.Error("the sink got it")
	}
}

func TestRFC9113_6_8_GoAwayTellsUnprocessed(t *testing.T) {
	r, c := rawServer(t)
	var sinks []*sink
	for range 2 {
		if err := c.Reserve(100); err != nil {
			t.Fatal(err)
		}
		k := newSink()
		st, err := c.Open(&tunnel.Request{Authority: "127.0.0.1:80"}, k)
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		sinks = append(sinks, k)
	}
	r.must(r.fr.WriteGoAway(1, http2.ErrCodeNo, nil))
	sinks[1].wait(t, "the second stream's end", func() bool { return sinks[1].reset != nil })
	if !errors.Is(sinks[1].reset, tunnel.ErrUnprocessed) {
		t.Errorf("reset = %v", sinks[1].reset)
	}
	r.must(r.headers(1, false, ":status", "200"))
	sinks[0].wait(t, "the first stream's answer", func() bool { return sinks[0].status == 200 })
}
