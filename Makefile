# ampoule: every way to build, try, test and install it. `make help` lists them.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help kernel guest programs build demo test bed bench install clean

PREFIX ?= /usr/local
# What `make build` makes, laid out as it is installed.
STAGE := target/ampoule
CARGO ?= cargo
# Without make's own job server, which cargo would take for one that it may use.
run := unset MAKEFLAGS; . tests/lib.sh;

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24
	echo
	echo "  PREFIX=$(PREFIX)  where \`make install\` puts things"
	echo "  AMPOULE_CACHE=$${AMPOULE_CACHE:-$${XDG_CACHE_HOME:-~/.cache}/ampoule}  kernels, images and the bed, kept over checkouts"

kernel: ## build the guest kernel (cached by the hash of its inputs)
	@$(run) stage_kernel $(STAGE)

guest: ## build the agent and the guest image
	@$(run) stage_guest $(STAGE)

programs: ## build ampoule, its VMM and its file server
	@$(run) stage_programs $(STAGE)

build: kernel guest programs ## build everything into target/ampoule

demo: build ## run a real Alpine container in its own VM
	@$(run) demo $(STAGE)

test: ## build everything; unit and end-to-end tests, ending in a count
	@tests/run $(STAGE)

bed: ## run CMD='...' on a throw-away host with real KVM
	@tests/bed/bed -- bash -c '$(subst ','\'',$(value CMD))'

bench: build ## boot spans, exits, guest instructions and sizes
	@tests/bench $(STAGE)

install: build ## install to PREFIX, with Alpine in the image store
	@$(run) install_to $(STAGE) $(DESTDIR)$(PREFIX)

clean: ## remove what was built here; the cache stays
	@$(CARGO) clean
