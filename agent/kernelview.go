package agent

import "ringfence.dev/attest/workload"

// What only some capture back ends know better than /proc and the socket tables.
type (
	// execWatcher tells a process's exec id after its latest execve, or zero.
	execWatcher interface {
		ExecID(workload.Process) (uint64, error)
	}
	// listenCounter counts how often a listening socket has come or gone in a scope.
	listenCounter interface{ Listens() uint64 }
)

// execID asks the back end, which is opened after the attestor and before the first question.
func (a *Agent) execID(p workload.Process) (uint64, error) {
	if w, ok := a.backend.(execWatcher); ok {
		return w.ExecID(p)
	}
	return 0, nil
}

// listens is the back end's count. Without one every answer is a new number, so
// that nothing is ever taken for unchanged.
func (a *Agent) listens() uint64 {
	if c, ok := a.backend.(listenCounter); ok {
		return c.Listens()
	}
	return a.unlistened.Add(1)
}
