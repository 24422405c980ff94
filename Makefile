MODEL  = models/SmolLM2-135M-Instruct.Q4_1.gguf
PRUNED = models/SmolLM2-135M-pruned.gguf

# `make build CARGO='cargo --config vendor/config.toml --offline'` is the air-gapped build: vendor/README.md.
CARGO = cargo

# Where `make install` puts what is not the binary.
PREFIX = $(HOME)/.local
SHARE = $(PREFIX)/share
PRINT = $(CARGO) run --release --locked --quiet --

# What `make dist` builds for: x86_64 or aarch64, and which processors of that kind. The engine crate knows but one for ARM.
DIST_ARCH = x86_64
DIST_TARGET = $(DIST_ARCH)-unknown-linux-gnu
ifeq ($(DIST_ARCH),aarch64)
DIST_CPU = armv8-a
else
DIST_CPU = x86-64-v3
DIST_FLAGS = -C target-cpu=$(DIST_CPU)
endif
# On another kind of machine, with Debian's cross compilers.
ifneq ($(DIST_ARCH),$(shell uname -m))
CROSS = $(DIST_ARCH)-linux-gnu-
CROSS_ENV = CC_$(DIST_ARCH)_unknown_linux_gnu=$(CROSS)gcc CXX_$(DIST_ARCH)_unknown_linux_gnu=$(CROSS)g++ \
	CARGO_TARGET_$(shell echo $(DIST_ARCH) | tr a-z A-Z)_UNKNOWN_LINUX_GNU_LINKER=$(CROSS)gcc
endif

# Prerequisites run left to right even under -j: setup has to finish before cargo starts, which is parallel by itself.
.NOTPARALLEL:
.DEFAULT_GOAL = help
.PHONY: help demo test setup model build check clean install dist

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /  \1	/p' Makefile

demo: setup model build ## Prune a small model by a quarter
	./target/release/putri-gguf $(MODEL) $(PRUNED) --sparsity 0.25 --force

test: setup model ## Run all tests, those that need a model included
	PUTRI_TEST_MODEL="$(CURDIR)/$(MODEL)" $(CARGO) test --release --locked

setup: ## Install the system packages the build needs
	scripts/setup

model: ## Fetch the small model (98 MB)
	scripts/fetch-model

build: ## Build the release binary
	$(CARGO) build --release --locked

# --release throughout: llama.cpp is compiled once per profile, and that is most of the time.
check: ## Formatting, lints and documentation, warnings as errors
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --release --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --release --locked

install: ## Install the binary, its manual page and completions for this user
	$(CARGO) install --path . --locked
	install -d $(SHARE)/man/man1 $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	$(PRINT) man > $(SHARE)/man/man1/putri-gguf.1
	$(PRINT) completions bash > $(SHARE)/bash-completion/completions/putri-gguf
	$(PRINT) completions zsh > $(SHARE)/zsh/site-functions/_putri-gguf
	$(PRINT) completions fish > $(SHARE)/fish/vendor_completions.d/putri-gguf.fish

# Nothing of the machine that builds it goes in but its kind: glibc and libstdc++ are inside, and kernels are for DIST_CPU.
dist: setup ## Build a binary for other machines into dist/
	$(CROSS_ENV) RUSTFLAGS="$(DIST_FLAGS) -C target-feature=+crt-static" \
		$(CARGO) build --release --locked --features static --target $(DIST_TARGET)
	install -D --strip --strip-program=$(CROSS)strip $${CARGO_TARGET_DIR:-target}/$(DIST_TARGET)/release/putri-gguf \
		dist/putri-gguf-$(DIST_TARGET)-$(DIST_CPU)

# The fetched model stays: it is an input, and 98 MB to get again.
clean: ## Remove what was built and the demo's output
	$(CARGO) clean
	rm -rf $(PRUNED) dist
