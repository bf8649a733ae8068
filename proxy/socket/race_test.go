//go:build race

package socket_test

// raceEnabled: under the race detector pools drop at random what is put into them.
const raceEnabled = true
