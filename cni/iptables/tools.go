package iptables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
)

var (
	// ErrNotFound reports that the iptables programs are not installed.
	ErrNotFound = errors.New("iptables: programs not found")
	// ErrReadBack reports that the rules in the kernel are not those just written.
	ErrReadBack = errors.New("iptables: the kernel holds other rules than were written")
	errChain    = errors.New("iptables: not a chain of ours")
)

func badChain(c Chain) error { return fmt.Errorf("%w: %q in table %q", errChain, c.Name, c.Table) }

// Variant is which of the kernel's two packet filters a program writes to.
type Variant string

const (
	NFT    Variant = "nft"
	Legacy Variant = "legacy"
)

// lockWait is how long, in seconds, a program waits for the xtables lock that
// another one holds. Docker or a firewall reload keeps it for a second or two.
const lockWait = "10"

// runLimit ends a program that hangs, lock wait included.
const runLimit = 30 * time.Second

// program is where the programs of one variant and family are.
type program struct{ save, restore string }

// Tools are the iptables programs of this machine. They live in the agent's own
// mount namespace, whichever network namespace they work in.
type Tools struct {
	programs map[Variant]map[Family]program
	fallback Variant
}

// Find looks for the iptables programs of both variants in PATH and the usual
// system directories. The variant that plain "iptables" is becomes the default.
// It returns [ErrNotFound] when there are none for IPv4.
func Find(ctx context.Context) (*Tools, error) {
	t := &Tools{programs: map[Variant]map[Family]program{}}
	if path, ok := lookup("iptables"); ok {
		v, err := variantOf(ctx, path)
		if err != nil {
			return nil, err
		}
		t.fallback = v
		t.add(v, "iptables", "ip6tables")
	}
	// By their full names they replace what plain "iptables" gave: the same
	// programs, but safe from the alternatives system being switched meanwhile.
	t.add(NFT, "iptables-nft", "ip6tables-nft")
	t.add(Legacy, "iptables-legacy", "ip6tables-legacy")
	for _, v := range []Variant{NFT, Legacy} {
		if _, ok := t.programs[v][IPv4]; ok {
			if t.fallback == "" {
				t.fallback = v
			}
			return t, nil
		}
	}
	return nil, ErrNotFound
}

// Variants lists the variants whose programs are installed, the default first.
func (t *Tools) Variants() []Variant {
	variants := []Variant{t.fallback}
	for _, v := range []Variant{NFT, Legacy} {
		if v != t.fallback && t.programs[v] != nil {
			variants = append(variants, v)
		}
	}
	return variants
}

// Only narrows the tools to one variant, for machines whose operator knows better.
func (t *Tools) Only(v Variant) (*Tools, error) {
	if t.programs[v] == nil {
		return nil, fmt.Errorf("variant %s: %w", v, ErrNotFound)
	}
	return &Tools{programs: map[Variant]map[Family]program{v: t.programs[v]}, fallback: v}, nil
}

func (t *Tools) add(v Variant, names ...string) {
	for i, f := range Families {
		save, ok1 := lookup(names[i] + "-save")
		restore, ok2 := lookup(names[i] + "-restore")
		if !ok1 || !ok2 {
			continue
		}
		if t.programs[v] == nil {
			t.programs[v] = map[Family]program{}
		}
		t.programs[v][f] = program{save: save, restore: restore}
	}
}

// lookup finds a program. A service's PATH often lacks the sbin directories.
func lookup(name string) (string, bool) {
	if path, err := exec.LookPath(name); err == nil {
		return path, true
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, true
		}
	}
	return "", false
}

// variantOf asks a program what it is. Before 1.8 there was only legacy, and
// before 1.6.2 iptables-restore could not wait for the lock: too old for us.
func variantOf(ctx context.Context, path string) (Variant, error) {
	ipt, err := goiptables.New(goiptables.Path(path))
	if err != nil {
		return "", fmt.Errorf("probe %s: %w", path, err)
	}
	if v1, v2, v3 := ipt.GetIptablesVersion(); v1 < 1 || v1 == 1 && (v2 < 6 || v2 == 6 && v3 < 2) {
		return "", fmt.Errorf("%s is version %d.%d.%d, 1.6.2 is needed: %w", path, v1, v2, v3, ErrNotFound)
	}
	text, err := run(ctx, "", path, "--version")
	if err != nil {
		return "", err
	}
	if strings.Contains(text, "nf_tables") {
		return NFT, nil
	}
	return Legacy, nil
}

// run runs a program on the present thread's network namespace. What it says on
// standard error is part of the error.
func run(ctx context.Context, input, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, runLimit)
	defer cancel()
	var out, errout strings.Builder
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = &out, &errout
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	if input != "" {
		cmd.Stdin = strings.NewReader(input)
	}
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(path), err, strings.Join(strings.Fields(errout.String()), " "))
	}
	return out.String(), nil
}
