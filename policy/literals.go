package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// checkLiterals refuses entities that no request can hold, such as
// Workload::"curl". In a permit they are a riddle, in a forbid a hole.
func (r *rule) checkLiterals() error {
	var errs []error
	check := func(uid cedar.EntityUID) {
		if err := checkLiteral(uid); err != nil {
			errs = append(errs, fmt.Errorf("%v can never match: %w", uid, err))
		}
	}
	for _, scope := range []ast.IsScopeNode{r.ast.Principal, r.ast.Resource} {
		if uid, ok := scopeEntity(scope); ok && uid.Type != typeEndpoint {
			check(uid)
		}
	}
	if r.endpoint != nil {
		check(cedar.NewEntityUID(typeService, cedar.String(r.endpoint.service)))
	}
	for _, c := range r.ast.Conditions {
		ast.Inspect(ast.NewNode(c.Body), func(n ast.IsNode) bool {
			if v, ok := n.(ast.NodeValue); ok {
				if uid, ok := v.Value.(cedar.EntityUID); ok {
					if uid.Type == typeEndpoint && !r.aboutEndpoints {
						errs = append(errs, fmt.Errorf("%v can never match: name endpoints in the resource scope", uid))
					} else {
						check(uid)
					}
				}
			}
			return true
		})
	}
	return errors.Join(errs...)
}

func checkLiteral(uid cedar.EntityUID) error {
	id := string(uid.ID)
	switch uid.Type {
	case typeWorkload:
		_, err := spiffeid.FromString(id)
		return err
	case typeService:
		if strings.HasPrefix(id, "spiffe:") {
			_, err := spiffeid.FromString(id)
			return err
		}
		return checkHostPort(id)
	case typeExternalHost:
		return checkHostPort(id)
	case typeAnonymous:
		return checkAddr(id)
	case typeAddress:
		if _, err := netip.ParseAddr(id); err == nil {
			return checkAddr(id)
		}
		return checkHostPort(id)
	case typeTrustDomain:
		if td, err := spiffeid.TrustDomainFromString(id); err != nil || td.Name() != id {
			return errors.New("not the bare name of a trust domain")
		}
	case typeNamespace:
		sid, err := spiffeid.FromString(id)
		if name, ok := strings.CutPrefix(sid.Path(), "/ns/"); err != nil || !ok || strings.Contains(name, "/") {
			return errors.New("not of the form spiffe://<trust domain>/ns/<namespace>")
		}
	case typeEndpoint:
		_, err := parseEndpoint(uid)
		return err
	}
	return nil
}

// checkHostPort and checkAddr want the one form in which addresses are written
// here, since ids are compared as text.
func checkHostPort(id string) error {
	if a, err := netip.ParseAddrPort(id); err != nil {
		return errors.New("neither a SPIFFE ID nor address:port")
	} else if hostPort(a) != id {
		return fmt.Errorf("write it %s", hostPort(a))
	}
	return nil
}

func checkAddr(id string) error {
	if a, err := netip.ParseAddr(id); err != nil {
		return errors.New("not an IP address")
	} else if plain(a).String() != id {
		return fmt.Errorf("write it %s", plain(a))
	}
	return nil
}
