package attest

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"ringfence.dev/attest/cgroup"
)

func TestEscape(t *testing.T) {
	for name, want := range map[string]string{
		"nginx": "nginx", "node_exporter": "node_exporter", "php8.2-fpm": "php8.2-fpm", "__": "__", "a_": "a_",
		"getty@tty1": "getty_-40tty1", "a b": "a_-20b", "_-": "_-5f-", "a_-40": "a_-5f-40", "_@": "__-40",
		".": "_-2e", "..": "_-2e_-2e", "...": "...", "../x": ".._-2fx", `dev-disk\x2d`: "dev-disk_-5cx2d",
		"ü": "_-c3_-bc", "\xff\x00": "_-ff_-00", "": "",
	} {
		if got := Escape(name); got != want {
			t.Errorf("Escape(%q) = %q, want %q", name, got, want)
		}
		if back, err := Unescape(want); err != nil || back != name {
			t.Errorf("Unescape(%q) = %q (%v), want %q", want, back, err, name)
		}
	}
	for _, bad := range []string{"_-", "_-4", "_-4G", "_-2E", "_-61", "a@b", ".", "..", "x_-program", "x_-user1000", "x_-unverified"} {
		if name, err := Unescape(bad); err == nil {
			t.Errorf("Unescape(%q) = %q, but no name is written so", bad, name)
		}
	}
}

// anyName makes names out of what is likely to confuse the escaping.
var anyName = rapid.OneOf(
	rapid.StringOfN(rapid.RuneFrom([]rune("a0._-@progmuse2f")), 1, 12, -1),
	rapid.StringN(1, 40, 255),
)

func TestEscapeIsInjectiveAndValid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := anyName.Draw(t, "name")
		got := Escape(name)
		if err := spiffeid.ValidatePathSegment(got); err != nil {
			t.Fatalf("%q becomes %q: %v", name, got, err)
		}
		if back, err := Unescape(got); err != nil || back != name {
			t.Fatalf("%q becomes %q and comes back as %q (%v)", name, got, back, err)
		}
	})
}

// subject is all that a template name is made of.
type subject struct {
	kind, name, uid string
}

func (s subject) segment() string {
	switch s.kind {
	case "user":
		return unitSegment(cgroup.Unit{Kind: cgroup.User, Name: s.name + ".service", UID: s.uid})
	case "program":
		return Escape(s.name) + markProgram
	case "unverified":
		return Escape(s.name) + markUnverified
	}
	return unitSegment(cgroup.Unit{Kind: cgroup.Service, Name: s.name + ".service"})
}

// Two subjects that differ in kind, name or user have different segments. A
// service and a plain executable are one kind here: that they do not meet is
// [units.exists]'s doing.
func TestKindsNeverMeet(t *testing.T) {
	kinds := rapid.SampledFrom([]string{"service", "user", "program", "unverified"})
	draw := func(t *rapid.T) subject {
		s := subject{kind: kinds.Draw(t, "kind"), name: anyName.Draw(t, "name")}
		if s.kind == "user" {
			s.uid = rapid.SampledFrom([]string{"0", "1", "10", "1000"}).Draw(t, "uid")
		}
		return s
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := draw(t), draw(t)
		if rapid.Bool().Draw(t, "same name") {
			b.name = a.name
		}
		// The hardest case: one's name looks like another's finished segment.
		if rapid.Bool().Draw(t, "imitate") {
			b.name = a.segment()
		}
		if a != b && a.segment() == b.segment() {
			t.Fatalf("%+v and %+v are both %q", a, b, a.segment())
		}
		if err := spiffeid.ValidatePathSegment(a.segment()); err != nil {
			t.Fatalf("%+v is %q: %v", a, a.segment(), err)
		}
	})
}

func TestTemplateIsBounded(t *testing.T) {
	a := &Attestor{trustDomain: testDomain, host: "a"}
	if id, err := a.template(strings.Repeat("x", 3000)); err == nil {
		t.Errorf("made an ID of %d bytes", len(id.String()))
	}
	if id, err := a.template("web"); err != nil || id.String() != "spiffe://lab.test/ns/a/sa/web" {
		t.Errorf("%s (%v)", id, err)
	}
	// The longest unit name, all of it escaped, fits.
	if _, err := a.template(Escape(strings.Repeat("@", 247))); err != nil {
		t.Error(err)
	}
}
