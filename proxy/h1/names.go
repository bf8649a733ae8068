package h1

// Names is a set of field names, compared without case and with every
// separator taken for a hyphen, the way CGI-style servers read them: a server
// that sees X_Forwarded_Client_Cert as our field must never see a client's.
// It is read-only and safe for concurrent use. A nil set is empty.
type Names struct {
	lengths uint64 // bit n: a name of n octets is in the set; bit 63: 63 and more
	folded  []string
}

// NewNames makes a set.
func NewNames(names ...string) *Names {
	n := &Names{}
	for _, name := range names {
		b := []byte(name)
		for i, c := range b {
			b[i] = folds[c]
		}
		n.lengths |= 1 << min(len(b), 63)
		n.folded = append(n.folded, string(b))
	}
	return n
}

// Has reports whether a field name, as it was sent, is in the set.
func (n *Names) Has(name []byte) bool {
	if n == nil || n.lengths&(1<<min(len(name), 63)) == 0 {
		return false
	}
	for _, folded := range n.folded {
		if foldsTo(name, folded) {
			return true
		}
	}
	return false
}
