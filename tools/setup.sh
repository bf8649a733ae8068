#!/bin/sh
# Installs what one purpose still misses on Debian or Ubuntu, and nothing else:
#   tools/setup.sh demo|test|bench|generate
# Services that come with the packages are not started: the programs are run by
# the demo, the tests and the benchmark themselves, in namespaces of their own.
set -eu

# program:package, so that nothing is installed over what is there in another way.
common="curl:curl nginx:nginx"
case "${1:-}" in
demo) need="$common redis-server:redis-server redis-cli:redis-tools iptables:iptables" ;;
bench) need="$common haproxy:haproxy wrk:wrk iptables:iptables" ;;
generate) need="clang:clang llvm-strip:llvm git:git" ;;
test)
	need="$common redis-server:redis-server redis-cli:redis-tools iptables:iptables ip:iproute2
		openssl:openssl gcc:gcc wrk:wrk psql:postgresql-client ssh:openssh-client sshd:openssh-server"
	;;
*)
	echo "usage: tools/setup.sh demo|test|bench|generate" >&2
	exit 2
	;;
esac

PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
missing=""
for pair in $need; do
	command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
if [ "$1" = test ]; then
	# Server and headers have no program in the PATH.
	ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing="$missing postgresql"
	[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
fi
if [ "$1" = generate ] && [ ! -e /usr/include/bpf/bpf_helpers.h ]; then
	missing="$missing libbpf-dev"
fi
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "please install, by whatever this system uses:$missing" >&2
	exit 1
fi
echo "installing:$missing"
root=""
[ "$(id -u)" = 0 ] || root=sudo

# Debian starts a service as it installs it, unless this file forbids it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap '$root rm -f "$policy"' EXIT
	trap 'exit 130' INT TERM HUP
	printf '#!/bin/sh\nexit 101\n' | $root tee "$policy" >/dev/null
	$root chmod 0755 "$policy"
fi

# Mirrors fail now and then, and package lists grow old.
try=1
until $root apt-get update -q; do
	[ "$try" -lt 4 ] || exit 1
	sleep $((try * 3))
	try=$((try + 1))
done
try=1
# shellcheck disable=SC2086 # the list is words
until $root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing; do
	[ "$try" -lt 3 ] || exit 1
	sleep $((try * 3))
	try=$((try + 1))
done

# Nor shall they start at the next boot.
if [ -d /run/systemd/system ]; then
	for package in $missing; do
		case "$package" in
		nginx | haproxy | redis-server | postgresql) $root systemctl disable --quiet "$package" || true ;;
		openssh-server) $root systemctl disable --quiet ssh || true ;;
		esac
	done
fi
