//go:build race

package faults_test

// raced says that the agents under test run with the race detector, as the tests do.
const raced = true
