package policy_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ringfence.dev/policy"
	"ringfence.dev/policy/authz"
)

// following runs Follow for the length of the test.
func following(t *testing.T, e *policy.Engine) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Follow(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// await waits until the status is as wanted.
func await(t *testing.T, e *policy.Engine, what string, ok func(policy.Status) bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for !ok(e.Status()) {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("waited in vain for %s: %+v", what, e.Status())
		}
	}
}

func TestFollow(t *testing.T) {
	dir := write(t, "p.cedar", permitAll)
	e := engineOf(t, policy.Config{Dir: dir})
	following(t, e)
	path := filepath.Join(dir, "p.cedar")

	put(t, path, `forbid(principal, action, resource);`)
	await(t, e, "a rewritten file", func(s policy.Status) bool { return s.Reloads == 1 })
	want(t, connect(t, open(t, e, meshed(curl, nginx))), authz.Deny)

	put(t, path, `forbid(`)
	await(t, e, "a refused file", func(s policy.Status) bool { return s.ReloadFailures == 1 && s.LastError != "" })

	put(t, filepath.Join(dir, ".p.cedar.new"), permitAll)
	if err := os.Rename(filepath.Join(dir, ".p.cedar.new"), path); err != nil {
		t.Fatal(err)
	}
	await(t, e, "a file renamed into place", func(s policy.Status) bool { return s.Reloads == 2 && s.LastError == "" })

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	await(t, e, "a removed file", func(s policy.Status) bool { return s.Reloads == 3 && s.Policies == 0 })
}

// Truncating and then writing, which is how many editors save, must not show the
// state between: it would leave out every forbid of the file.
func TestFollowDoesNotLoadHalfASave(t *testing.T) {
	dir := write(t, "p.cedar", permitAll, "q.cedar", `forbid(principal, action, resource) when { resource.port == 1 };`)
	e := engineOf(t, policy.Config{Dir: dir})
	following(t, e)
	first := e.Version()
	f, err := os.OpenFile(filepath.Join(dir, "q.cedar"), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	await(t, e, "the empty file's refusal", func(s policy.Status) bool { return s.ReloadFailures == 1 })
	if e.Version() != first {
		t.Error("an empty file was loaded")
	}
	if _, err := f.WriteString(`forbid(principal, action, resource) when { resource.port == 2 };`); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, e, "the whole file", func(s policy.Status) bool { return s.Reloads == 1 && s.Policies == 2 })
}

// Kubernetes swaps a symbolic link to a whole directory, deployments often rename one.
func TestFollowReplacedDirectory(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "policies")
	if err := os.Rename(write(t, "p.cedar", permitAll), dir); err != nil {
		t.Fatal(err)
	}
	e := engineOf(t, policy.Config{Dir: dir})
	following(t, e)
	if err := os.Rename(dir, filepath.Join(base, "old")); err != nil {
		t.Fatal(err)
	}
	await(t, e, "the loss of the directory", func(s policy.Status) bool { return s.ReloadFailures == 1 })
	want(t, connect(t, open(t, e, meshed(curl, nginx))), authz.Permit)
	if err := os.Rename(write(t, "p.cedar", `forbid(principal, action, resource);`), dir); err != nil {
		t.Fatal(err)
	}
	await(t, e, "the new directory", func(s policy.Status) bool { return s.Reloads == 1 && s.LastError == "" })
	put(t, filepath.Join(dir, "p.cedar"), permitAll)
	await(t, e, "a change in the new directory", func(s policy.Status) bool { return s.Reloads == 2 })
}

func TestFollowWithoutDirectory(t *testing.T) {
	e := engineOf(t, policy.Config{})
	following(t, e)
	dir := filepath.Join(t.TempDir(), "later")
	e = engineOf(t, policy.Config{Dir: dir})
	following(t, e)
	if err := os.Rename(write(t, "p.cedar", permitAll), dir); err != nil {
		t.Fatal(err)
	}
	await(t, e, "the directory to come", func(s policy.Status) bool { return s.Policies == 1 })
}
