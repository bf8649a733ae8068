package authz_test

import (
	"encoding/json"
	"errors"
	"testing"

	"ringfence.dev/policy/authz"
)

func TestIDRoundTrip(t *testing.T) {
	id := authz.NewID()
	if id.IsZero() || id == authz.NewID() {
		t.Fatal("ids are not random")
	}
	for _, seq := range []uint32{0, 1, 10, 1<<32 - 1} {
		id.Seq = seq
		back, err := authz.ParseID(id.String())
		if err != nil || back != id {
			t.Errorf("%s came back as %v, %v", id, back, err)
		}
	}
}

func TestParseIDRefuses(t *testing.T) {
	const conn = "0123456789abcdef01234567"
	for _, text := range []string{
		"", "-1", conn[1:], conn + "0", "0123456789ABCDEF01234567", conn + "-", conn + "-0", conn + "-01",
		conn + "-+1", conn + "--1", conn + "-4294967296", conn + "-1-1", conn + " ", "g" + conn[1:],
	} {
		if id, err := authz.ParseID(text); !errors.Is(err, authz.ErrBadID) {
			t.Errorf("%q gave %v, %v", text, id, err)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("0123456789abcdef01234567-7")
	f.Fuzz(func(t *testing.T, text string) {
		if id, err := authz.ParseID(text); err == nil && id.String() != text {
			t.Fatalf("%q came back as %q", text, id)
		}
	})
}

// A forgotten value must refuse, and names must survive the log.
func TestEffectsAndModes(t *testing.T) {
	var zero authz.Decision
	if zero.Allowed() || zero.Effect != authz.Deny {
		t.Error("the zero decision permits")
	}
	for _, e := range []authz.Effect{authz.Deny, authz.Permit, authz.WouldDeny} {
		if got := (authz.Decision{Effect: e}).Allowed(); got != (e != authz.Deny) {
			t.Errorf("%v allowed: %v", e, got)
		}
		var back authz.Effect
		if text, err := json.Marshal(e); err != nil || json.Unmarshal(text, &back) != nil || back != e {
			t.Errorf("%v came back as %v", e, back)
		}
	}
	for _, m := range []authz.Mode{authz.Watch, authz.DryRun, authz.Enforce} {
		var back authz.Mode
		if text, err := json.Marshal(m); err != nil || json.Unmarshal(text, &back) != nil || back != m {
			t.Errorf("%v came back as %v", m, back)
		}
	}
	var e authz.Effect
	var m authz.Mode
	if e.UnmarshalText([]byte("Permit")) == nil || m.UnmarshalText([]byte("")) == nil {
		t.Error("unknown names are accepted")
	}
	if authz.Effect(9).String() != "effect(9)" || authz.Mode(9).String() != "mode(9)" {
		t.Error("values out of range have no name")
	}
	for side, name := range map[authz.Side]string{authz.Egress: "egress", authz.Ingress: "ingress", authz.Local: "local"} {
		if side.String() != name {
			t.Errorf("%v is not %s", side, name)
		}
	}
}
