package lab

import (
	"bytes"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
)

func TestWireSeesWhatPasses(t *testing.T) {
	l := testLab(t, Options{Capture: "off"})
	v4, v6 := Address("b")
	for _, ip := range []netip.Addr{v4, v6} {
		server := listenOn(t, l, "b", netip.AddrPortFrom(ip, 7000))
		go func() {
			if c, err := server.Accept(); err == nil {
				c.Read(make([]byte, 100)) // unread bytes would turn the close into a reset
				c.Write([]byte("the secret of the server"))
				c.Close()
			}
		}()
		w, err := l.Record("a")
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("bash", "-c", "exec 3<>/dev/tcp/"+ip.String()+"/7000; echo the secret of the client >&3; cat <&3")
		out := new(bytes.Buffer)
		cmd.Stdout = out
		if err := l.Start("a", "", cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "server") {
			t.Fatalf("%v %q", err, out)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if !w.Saw("the secret of the client") || !w.Saw("the secret of the server") {
			t.Error(ip, "what passed in clear was not seen")
		}
		if w.Bytes(7000) == 0 || w.Bytes(7001) != 0 || w.TLSRecords() != 0 {
			t.Errorf("%s: %d bytes on 7000, %d on 7001, %d TLS records", ip, w.Bytes(7000), w.Bytes(7001), w.TLSRecords())
		}
	}
}

func FuzzTCPPayload(f *testing.F) {
	f.Add([]byte("\x45\x00\x00\x2c\x00\x00\x40\x00\x40\x06\x00\x00\xc0\x00\x02\x01\xc0\x00\x02\x02" +
		"\x1b\x58\x00\x50\x00\x00\x00\x00\x00\x00\x00\x00\x50\x18\x00\x00\x00\x00\x00\x00\x16\x03\x01\x00"))
	f.Add([]byte("\x60\x00\x00\x00\x00\x15\x06\x40" + strings.Repeat("\x00", 32) +
		"\x1b\x58\x00\x50\x00\x00\x00\x00\x00\x00\x00\x00\x50\x18\x00\x00\x00\x00\x00\x00x"))
	f.Fuzz(func(t *testing.T, packet []byte) {
		if _, payload, ok := tcpPayload(packet); ok && (len(payload) == 0 || !bytes.HasSuffix(packet, payload) && packet[0]>>4 == 6) {
			t.Errorf("payload %q of %q", payload, packet)
		}
	})
}
