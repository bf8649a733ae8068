package lab

import (
	"fmt"
	"os"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"ringfence.dev/ca"
)

// distributeTrust gives every agent an intermediate of one root, as an operator
// does with two real hosts. The root's key stays in the lab's own directory,
// where no agent looks.
func (l *Lab) distributeTrust() error {
	td, err := spiffeid.TrustDomainFromString(l.opts.TrustDomain)
	if err != nil {
		return err
	}
	root := l.path("ca")
	// Bare hosts may get agents again, in another trust domain this time.
	if err := os.RemoveAll(root); err != nil {
		return err
	}
	if _, err := ca.Init(root, td, ca.Options{}); err != nil {
		return err
	}
	for _, h := range l.opts.Agents {
		file, err := ca.NewIntermediate(root, h, ca.Options{})
		if err != nil {
			return fmt.Errorf("host %s: %w", h, err)
		}
		if err := os.MkdirAll(l.path(h, "state"), 0o700); err != nil {
			return err
		}
		if err := ca.InstallIntermediate(l.path(h, "state", "ca"), file, ca.Options{}); err != nil {
			return fmt.Errorf("host %s: %w", h, err)
		}
	}
	return nil
}
