package bpf

// The flags are fixed so that the same clang gives the same object on every
// machine; headers/asm stands in for the architecture's own headers.
//go:generate go tool bpf2go -cc clang -strip llvm-strip -cflags "-O2 -g -Wall -Werror -mcpu=v2" -target bpfel -go-package bpf -type scope -type agent -type conn_key -type note -type image_key -type sock_state -type exemption -type port_key -type port -type cgroup_key -type listener_key -type route_key -type route -type deny_key -type deny -type event -type rf_reason -type rf_event_kind -type rf_sock_kind -type rf_route_kind -type rf_scope_flag -no-global-types capture capture.bpf.c -- -Iheaders
