package h1

import "strings"

// methods are those of IANA's HTTP Method Registry. Sniffing goes by them
// alone: an extension method on a service that is only observed is opaque,
// and in return no other protocol's first word is ever held back.
const methods = " ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT CONNECT COPY DELETE GET HEAD LABEL LINK LOCK" +
	" MERGE MKACTIVITY MKCALENDAR MKCOL MKREDIRECTREF MKWORKSPACE MOVE OPTIONS ORDERPATCH PATCH POST" +
	" PROPFIND PROPPATCH PUT QUERY REBIND REPORT SEARCH TRACE UNBIND UNCHECKOUT UNLINK UNLOCK UPDATE" +
	" UPDATEREDIRECTREF VERSION-CONTROL "

const longestMethod = len("UPDATEREDIRECTREF")

// couldBeHTTP reports whether b, the first octets of a connection, begins with
// a registered method and a space, or with the beginning of one.
func couldBeHTTP(b []byte) bool {
	var word [longestMethod + 2]byte
	word[0] = ' '
	n := 1 + copy(word[1:], b)
	for i := 1; i < n; i++ {
		if word[i] == ' ' {
			n = i + 1
			break
		}
	}
	return strings.Contains(methods, view(word[:n]))
}

// couldBeLine reports whether a line can still become a request line with the
// octets b, which has no LF. A CR is good only as the last octet.
func couldBeLine(b []byte, first bool) bool {
	for i, c := range b {
		if class[c]&(isTarget|isToken) == 0 && c != ' ' && (c != '\r' || i != len(b)-1) {
			return false
		}
	}
	return !first || class[b[0]]&isToken != 0
}
