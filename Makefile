# ringfence. `make help` says what there is to make.

GO       ?= go
MODE     ?= auto
FUZZTIME ?= 2m
PREFIX   ?= /usr/local
DESTDIR  ?=
BENCH    ?=

# What needs root asks for it; the build itself never does.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# sudo resets both, and the Go tool is rarely where root looks.
AS_ROOT = $(SUDO) env "PATH=$$PATH" "CGO_ENABLED=$$CGO_ENABLED" "GOTOOLCHAIN=$${GOTOOLCHAIN:-auto}"

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

export CGO_ENABLED ?= 0

.DEFAULT_GOAL := build
.PHONY: build demo test test-unit bench fuzz lint vet cross generate install uninstall clean help

build: ## build bin/ringfence (the default)
	$(GO) build -trimpath -o bin/ringfence ./tools/ringfence

demo: ## show what ringfence does, with real programs (MODE=auto, ebpf or iptables)
	tools/setup.sh demo
	$(GO) build -trimpath -o bin/ringfence ./tools/ringfence
	$(GO) build -trimpath -o bin/demo ./tools/demo
	$(SUDO) bin/demo -mode $(MODE) -binary bin/ringfence

# The race detector needs cgo; what is shipped does not.
test: export CGO_ENABLED = 1
test: ## run every test this machine can run, as root, and print the coverage
	tools/setup.sh test
	$(MAKE) vet cross
	mkdir -p build
	$(AS_ROOT) RINGFENCE_ROOT_TESTS=1 $(GO) test -race -p 2 -timeout 20m \
		-covermode=atomic -coverpkg=./... -coverprofile=build/coverage.out ./...
	@$(GO) tool cover -func=build/coverage.out | awk '$$1 == "total:" { print "statement coverage of unit and namespace tests: " $$3 }'

test-unit: ## run the tests that need neither root nor anything installed
	$(GO) vet ./...
	$(GO) test ./...

bench: build ## compare with HAProxy and nginx, side by side (BENCH="--quick" and the like)
	tools/setup.sh bench
	$(GO) build -trimpath -o bin/bench ./tools/bench
	$(SUDO) bin/bench -binary bin/ringfence $(BENCH)

fuzz: ## run every fuzz target for FUZZTIME (2m)
	@set -e; for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "== $$pkg $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

lint: vet ## check formatting, vet, staticcheck
	@bad=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$bad" || { echo "gofmt would change:"; echo "$$bad"; exit 1; }
	$(GO) run $(STATICCHECK) ./...
	@if command -v clang-format >/dev/null; then clang-format --dry-run -Werror $$(git ls-files 'bpf/*.c' 'bpf/headers/ringfence.h'); \
	else echo "clang-format is not installed: C is not checked"; fi

vet:
	$(GO) vet ./...

# The gateways that ringfence also runs on.
cross: export CGO_ENABLED = 0
cross:
	GOARCH=arm64 $(GO) build -trimpath -o build/ringfence-arm64 ./tools/ringfence
	GOARCH=arm GOARM=7 $(GO) build -trimpath -o build/ringfence-armv7 ./tools/ringfence

generate: ## rebuild the BPF objects (installs clang); they must come out as they are committed
	tools/setup.sh generate
	$(GO) generate ./bpf
	git diff --exit-code --stat -- bpf

# Builds only what is missing: root seldom has Go in its path, and what it builds belongs to it.
install: ## install the built binary, the systemd unit and a default configuration (PREFIX, DESTDIR)
	@test -x bin/ringfence || $(MAKE) build
	install -D -m 0755 bin/ringfence $(DESTDIR)$(PREFIX)/bin/ringfence
	install -d -m 0755 $(DESTDIR)/etc/systemd/system
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' deploy/ringfence.service > $(DESTDIR)/etc/systemd/system/ringfence.service
	chmod 0644 $(DESTDIR)/etc/systemd/system/ringfence.service
	install -d -m 0700 $(DESTDIR)/etc/ringfence $(DESTDIR)/etc/ringfence/policies
	test -e $(DESTDIR)/etc/ringfence/agent.yaml || install -m 0600 deploy/agent.yaml $(DESTDIR)/etc/ringfence/agent.yaml
	@echo "next: systemctl daemon-reload && systemctl enable --now ringfence"

uninstall: ## remove what install installed, except configuration and state
	rm -f $(DESTDIR)$(PREFIX)/bin/ringfence $(DESTDIR)/etc/systemd/system/ringfence.service

clean: ## remove everything that was built
	rm -rf bin build

help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
