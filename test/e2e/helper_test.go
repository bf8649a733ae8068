package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

// The test binary stands in for small programs that Debian does not have. It
// is run as: helper NAME ARGUMENTS.

// helperCommand is the command line of a helper.
func helperCommand(args ...string) []string {
	return append([]string{os.Args[0], "helper"}, args...)
}

func helper(name string, args []string) int {
	var err error
	switch name {
	case "web":
		err = helperWeb(args[0])
	case "greet":
		err = helperGreet(args[0])
	case "talk":
		err = helperTalk(args[0], args[1])
	case "bind":
		err = helperBind(args[0])
	default:
		err = errors.New("no such helper")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// seen is what the web helper answers with: what reached it.
type seen struct {
	Target string
	Host   string
	Remote string
	Header http.Header
	Body   int64
}

// helperWeb is a server that answers each request with what it has seen of it.
// It prints each target, before anything else.
func helperWeb(addr string) error {
	return http.ListenAndServe(addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Println("request", r.RequestURI)
		n, _ := io.Copy(io.Discard, r.Body)
		json.NewEncoder(w).Encode(seen{r.RequestURI, r.Host, r.RemoteAddr, r.Header, n})
	}))
}

// helperGreet is a server that speaks first, as SMTP or MySQL do, echoes until
// the client's end of stream, and then says goodbye: half-close must work for it.
func helperGreet(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			fmt.Println("client", c.RemoteAddr())
			fmt.Fprintln(c, "greetings, client at", c.RemoteAddr())
			io.Copy(c, c)
			fmt.Fprintln(c, "goodbye")
		}()
	}
}

// helperTalk connects, sends its standard input, closes its half, and prints
// what comes until the end. How is "whole", or "bytewise" for a byte at a time.
func helperTalk(addr, how string) error {
	c, err := net.DialTimeout("tcp", addr, 8*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Printf("connected to %v\n", c.RemoteAddr())
	send := make(chan error, 1)
	go func() { send <- sendAll(c.(*net.TCPConn), how) }()
	_, err = io.Copy(os.Stdout, c)
	return errors.Join(err, <-send)
}

func sendAll(c *net.TCPConn, how string) error {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	if how != "bytewise" {
		if _, err := c.Write(in); err != nil {
			return err
		}
		return c.CloseWrite()
	}
	for i := range in {
		if _, err := c.Write(in[i : i+1]); err != nil {
			return err
		}
	}
	return c.CloseWrite()
}

// helperBind tries to take an address.
func helperBind(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	return l.Close()
}
