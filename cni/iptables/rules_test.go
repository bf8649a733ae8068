package iptables

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestSplitArgsHostile(t *testing.T) {
	for line, want := range map[string][]string{
		`-A X --path "/a b/c\\x2d.service" -j Y`: {"-A", "X", "--path", `/a b/c\x2d.service`, "-j", "Y"},
		`-A X --path "/say \"-j ACCEPT\"" -j Y`:  {"-A", "X", "--path", `/say "-j ACCEPT"`, "-j", "Y"},
		`-A X --comment "" -j Y`:                 {"-A", "X", "--comment", "", "-j", "Y"},
		"  -A \t X  ":                            {"-A", "X"},
		`-A X --path "/ends with backslash\\"`:   {"-A", "X", "--path", `/ends with backslash\`},
	} {
		if got, err := splitArgs(line); err != nil || !slices.Equal(got, want) {
			t.Errorf("splitArgs(%s) = %q, %v; want %q", line, got, err, want)
		}
	}
	if _, err := splitArgs(`-A X "open`); !errors.Is(err, errSyntax) {
		t.Errorf("an open quote gives %v", err)
	}
}

func TestQuotedArgumentsSurvive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		args := rapid.SliceOf(rapid.StringMatching(`[ -~]{0,20}`)).Draw(t, "args")
		got, err := splitArgs(strings.Join(quoteAll(args), " "))
		if err != nil || len(got) != len(args) || len(args) > 0 && !slices.Equal(got, args) {
			t.Fatalf("%q came back as %q, %v", args, got, err)
		}
	})
}

func TestCanonicalSpellings(t *testing.T) {
	for _, same := range [][2]string{
		{"-p tcp -m tcp --dport 80 -j RETURN", "-p tcp --dport 80 -j RETURN"},
		{"-d 127.0.0.1/32 -p tcp -j X", "-p tcp -d 127.0.0.1 -j X"},
		{"-p 136 -j REJECT", "-p udplite -j REJECT"},
		{"-m socket --transparent --nowildcard -j X", "-m socket --nowildcard --transparent -j X"},
	} {
		if a, b := R(same[0]).canonical(), R(same[1]).canonical(); a != b {
			t.Errorf("%q is not %q", a, b)
		}
	}
	for _, other := range [][2]string{
		{"! -o lo -j DROP", "-o lo -j DROP"},
		{"-m cgroup --path /a -j RETURN", "-m cgroup --path /b -j RETURN"},
		{"-j X", "-g X"},
		{"-d 127.0.0.1 -j X", "-s 127.0.0.1 -j X"},
		{"-o lo ! -d 10.0.0.1 -j X", "! -o lo -d 10.0.0.1 -j X"},
	} {
		if a, b := R(other[0]).canonical(), R(other[1]).canonical(); a == b {
			t.Errorf("%q is taken for %q", other[0], other[1])
		}
	}
}

func TestParseSaveRefusesOddInput(t *testing.T) {
	for _, text := range []string{"-A INPUT -j DROP\n", "*nat\n-X FOO\nCOMMIT\n", "*nat\n-A\n", "*nat\nCOMMIT\n:X - [0:0]\n"} {
		if _, err := parseSave(text); !errors.Is(err, errSyntax) {
			t.Errorf("parseSave(%q) = %v", text, err)
		}
	}
}

func TestRulesetCheckStaysInsideOwnChains(t *testing.T) {
	for _, c := range []Chain{
		{Table: "nat", Name: "OUTPUT"},
		{Table: "nat", Name: "RINGFENCE_" + strings.Repeat("X", 20)},
		{Table: "raw", Name: "RINGFENCE_X"},
		{Table: "nat", Name: "RINGFENCE_X", Rules: []Rule{{"--path", "/a\n-A INPUT -j DROP"}}},
	} {
		if err := (Ruleset{c}).check(); err == nil {
			t.Errorf("%+v is let through", c)
		}
	}
}

// Whatever a namespace holds, the transaction names only chains of ours, and in
// built-in chains only jumps to them.
func TestTransactionTouchesOnlyOwn(t *testing.T) {
	have, err := parseSave("*nat\n:OUTPUT ACCEPT [0:0]\n:DOCKER - [0:0]\n:RINGFENCE_OLD - [0:0]\n-A OUTPUT -j DOCKER\n" +
		"-A OUTPUT -p tcp -j RINGFENCE_OLD\n-A OUTPUT -p tcp -j RINGFENCE_OUT\n-A DOCKER -j RETURN\nCOMMIT\n*raw\n:RINGFENCE_R - [0:0]\nCOMMIT\n")
	if err != nil {
		t.Fatal(err)
	}
	text := transaction(have, Ruleset{{Table: "nat", Name: "RINGFENCE_OUT", Hook: "OUTPUT", Rules: []Rule{R("-j RETURN")}}})
	want := `*nat
:RINGFENCE_OLD - [0:0]
:RINGFENCE_OUT - [0:0]
-D OUTPUT -p tcp -j RINGFENCE_OLD
-D OUTPUT -p tcp -j RINGFENCE_OUT
-I OUTPUT 1 -j RINGFENCE_OUT
-A RINGFENCE_OUT -j RETURN
-X RINGFENCE_OLD
COMMIT
*raw
:RINGFENCE_R - [0:0]
-X RINGFENCE_R
COMMIT
`
	if text != want {
		t.Errorf("got\n%s", text)
	}
}

func TestForwards(t *testing.T) {
	s, err := parseSave("*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n" +
		"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80\n" +
		"-A DOCKER -i docker0 -j RETURN\n-A OUTPUT -p tcp -m tcp --dport 1 -j DNAT --to-destination 10.0.0.1\n-A DOCKER -p tcp -j DNAT --to-destination 10.0.0.1\nCOMMIT\n")
	if err != nil {
		t.Fatal(err)
	}
	got := s.forwards()
	if len(got) != 1 || strings.Join(got[0], " ") != "! -i docker0 -p tcp -m tcp --dport 8080" {
		t.Errorf("forwards = %q", got)
	}
}

func FuzzParseSave(f *testing.F) {
	f.Add("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m cgroup --path \"/a b\" -j RINGFENCE_OUT\nCOMMIT\n")
	f.Add("# Table `x' is incompatible\n*filter\n-A INPUT ! -i lo -j DROP\n")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSave(text)
		if err != nil {
			return
		}
		s.foreign()
		s.holdsOwn()
		for l := range strings.Lines(transaction(s, nil)) {
			fields := strings.Fields(l)
			switch {
			case fields[0] == "-D", fields[0][0] == '*', fields[0] == "COMMIT":
			case strings.Contains(l, Prefix):
			default:
				t.Fatalf("line %q touches what is not ours", l)
			}
		}
	})
}

func TestIdleTables(t *testing.T) {
	const idle = "*nat\n:OUTPUT ACCEPT [0:0]\n:INPUT ACCEPT [1:2]\nCOMMIT\n"
	for text, want := range map[string]string{
		"":                                     "",
		idle:                                   "OUTPUT INPUT",
		idle + "*mangle\n:X - [0:0]\nCOMMIT\n": "OUTPUT INPUT",
		"*nat\n:OUTPUT DROP [0:0]\n:INPUT ACCEPT [0:0]\nCOMMIT\n":     "",
		"*nat\n:INPUT ACCEPT [0:0]\n:THEIRS - [0:0]\nCOMMIT\n":        "",
		"*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j ACCEPT\nCOMMIT\n":   "",
		idle + "# Table `filter' is incompatible, use 'nft' tool.\n":  "",
		"# Generated\n" + idle + "# Completed":                        "OUTPUT INPUT",
		"*nat\n:OUTPUT ACCEPT [0:0]\n[1:2] -A OUTPUT -j ACCEPT\n:X -": "",
	} {
		got := idleTables(text)
		if strings.Join(got["nat"], " ") != want || want == "" && len(got) > 0 {
			t.Errorf("%q: %q", text, got)
		}
	}
}
