// Package netns opens network namespaces and does single things inside them:
// run a function, open a socket. A goroutine never stays in a foreign namespace.
package netns
