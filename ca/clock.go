package ca

import (
	"crypto/x509"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// epoch is a moment that has passed for certain: no release was made before it.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// buildTime is when this program's source was committed, or epoch when it was
// built without that stamp.
var buildTime = sync.OnceValue(func() time.Time {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return epoch
	}
	for _, s := range info.Settings {
		if t, err := time.Parse(time.RFC3339, s.Value); s.Key == "vcs.time" && err == nil && t.After(epoch) {
			return t
		}
	}
	return epoch
})

// checkClock refuses a clock that stands before the program or before the
// issuer existed. Machines without a battery wake up in 1970, and certificates
// made then would be worthless or, worse, valid for ever.
func checkClock(now time.Time, issuer *x509.Certificate) error {
	floor, what := buildTime(), "this program was built"
	if issuer != nil && issuer.NotBefore.After(floor) {
		floor, what = issuer.NotBefore, "the issuing certificate begins"
	}
	if now.Before(floor.Add(-Backdate)) {
		return fmt.Errorf("%w: it says %s, but %s at %s; set the time (timedatectl set-ntp true) and try again",
			ErrClock, stamp(now), what, stamp(floor))
	}
	return nil
}
