package iptables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"ringfence.dev/cni/netns"
)

// Namespace is our rules in one network namespace. It is safe for concurrent
// use. It holds no kernel object: rules stay when it is forgotten.
type Namespace struct {
	tools *Tools
	ns    *netns.Handle

	// mu held means that nobody else of this process reads and writes rules here.
	mu sync.Mutex

	// Set by Open, then read-only.
	variant Variant
	usable  []Variant // those whose rules can be read here
	mixed   bool      // both variants hold rules of others
}

// Open finds out which variant the namespace uses: the one that holds rules of
// others. When both do, the one with more; when neither does, the default of
// the machine. Our own rules count for nothing, they may be a former choice.
func (t *Tools) Open(ctx context.Context, ns *netns.Handle) (*Namespace, error) {
	n := &Namespace{tools: t, ns: ns}
	err := ns.Do(func() error {
		most := 0
		var errs []error
		for _, v := range t.Variants() {
			rules, err := t.inUse(ctx, v)
			if err != nil {
				// Programs are installed, but this kernel is without that variant.
				errs = append(errs, err)
				continue
			}
			n.usable = append(n.usable, v)
			n.mixed = n.mixed || most > 0 && rules > 0
			if rules > most || n.variant == "" {
				most, n.variant = rules, v
			}
		}
		if n.variant == "" {
			return errors.Join(errs...)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("find the iptables variant in use: %w", err)
	}
	return n, nil
}

// OpenAs is Open for a caller who knows the variant, from a former Open.
func (t *Tools) OpenAs(ns *netns.Handle, v Variant) *Namespace {
	return &Namespace{tools: t, ns: ns, variant: v, usable: []Variant{v}}
}

// Variant is the variant in use, and whether rules of others are in both.
func (n *Namespace) Variant() (v Variant, mixed bool) { return n.variant, n.mixed }

// Family reports whether rules of a family can be written at all.
func (n *Namespace) Family(f Family) bool {
	_, ok := n.tools.programs[n.variant][f]
	return ok
}

// Apply makes the namespace hold exactly these chains of ours, and reads them
// back. A family that is missing in want is emptied. Applying the same twice
// changes nothing. On error the rules of that family are what they were
// (each table for itself, in the legacy variant); use Remove to take back the rest.
func (n *Namespace) Apply(ctx context.Context, want map[Family]Ruleset) error {
	for f, rules := range want {
		if err := rules.check(); err != nil {
			return err
		}
		if len(rules) > 0 && !n.Family(f) {
			return fmt.Errorf("%v rules, variant %s: %w", f, n.variant, ErrNotFound)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ns.Do(func() error {
		for _, v := range n.usable {
			for _, f := range Families {
				rules := want[f]
				if v != n.variant {
					rules = nil // left from a time when the other variant was in use
				}
				if err := n.tools.apply(ctx, v, f, rules); err != nil {
					return fmt.Errorf("%v rules (%s): %w", f, v, err)
				}
			}
		}
		return nil
	})
}

// Remove takes away all that carries our prefix, in both variants and families.
// It goes on after an error and returns all of them. In the nft variant the tables that
// were not there before us go too, unless somebody uses them by now; the legacy variant's
// stay, empty, for as long as the namespace: its kernel modules have no way to
// take one back.
func (n *Namespace) Remove(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ns.Do(func() error {
		var errs []error
		for _, v := range n.usable {
			for _, f := range Families {
				if err := n.tools.apply(ctx, v, f, nil); err != nil {
					errs = append(errs, fmt.Errorf("remove %v rules (%s): %w", f, v, err))
				}
			}
		}
		return errors.Join(errs...)
	})
}

// Verify compares what the kernel holds with want, and names each difference.
func (n *Namespace) Verify(ctx context.Context, want map[Family]Ruleset) (wrong []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	err := n.ns.Do(func() error {
		for _, v := range n.usable {
			for _, f := range Families {
				wrong = append(wrong, n.verify(ctx, v, f, want[f])...)
			}
		}
		return nil
	})
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	return wrong
}

func (n *Namespace) verify(ctx context.Context, v Variant, f Family, want Ruleset) (wrong []string) {
	have, err := n.tools.read(ctx, v, f)
	if err != nil {
		return []string{fmt.Sprintf("%v rules (%s) cannot be read: %v", f, v, err)}
	}
	if v != n.variant {
		want = nil
	}
	for _, text := range have.diff(want) {
		wrong = append(wrong, fmt.Sprintf("%v (%s): %s", f, v, text))
	}
	return wrong
}

// apply runs on a thread in the namespace. Between reading and writing somebody
// may change the jumps we are about to delete: then the restore fails as a
// whole, and we look again.
func (t *Tools) apply(ctx context.Context, v Variant, f Family, want Ruleset) error {
	const attempts = 3
	var unused []string
	var err error
	for range attempts {
		var have state
		if have, err = t.read(ctx, v, f); err != nil {
			return err
		}
		if len(want) == 0 && !have.holdsOwn() {
			return nil
		}
		full := want
		if v == NFT {
			full, unused = want.marked(have), have.madeHereFor(want)
		}
		input := transaction(have, full)
		if _, err = run(ctx, input, t.programs[v][f].restore, "--noflush", "-w", lockWait); err == nil {
			break
		}
		if ctx.Err() != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	have, err := t.read(ctx, v, f)
	if err != nil {
		return err
	}
	if wrong := have.diff(want); len(wrong) > 0 {
		return fmt.Errorf("%w: %s", ErrReadBack, strings.Join(wrong, "; "))
	}
	t.dispose(ctx, f, unused)
	return nil
}

// read reads one family's rules. A legacy table that nobody has used in this
// namespace is not read, because reading would bring it into being.
func (t *Tools) read(ctx context.Context, v Variant, f Family) (state, error) {
	p, ok := t.programs[v][f]
	if !ok || v == Legacy && !legacyTables(f) {
		return state{}, nil
	}
	text, err := run(ctx, "", p.save)
	if err != nil {
		return nil, err
	}
	return parseSave(text)
}

// inUse counts the rules of others in one variant.
func (t *Tools) inUse(ctx context.Context, v Variant) (rules int, err error) {
	for _, f := range Families {
		s, err := t.read(ctx, v, f)
		if err != nil {
			return 0, err
		}
		rules += s.foreign()
	}
	return rules, nil
}

// legacyTables reports whether the thread's namespace has any table of the
// legacy variant.
func legacyTables(f Family) bool {
	name := "ip_tables_names"
	if f == IPv6 {
		name = "ip6_tables_names"
	}
	text, err := os.ReadFile("/proc/thread-self/net/" + name)
	return err == nil && len(strings.Fields(string(text))) > 0
}
