MODEL  = models/SmolLM2-135M-Instruct.Q4_1.gguf
PRUNED = models/SmolLM2-135M-pruned.gguf

# `make build CARGO='cargo --config vendor/config.toml --offline'` is the air-gapped build: vendor/README.md.
CARGO = cargo

# Prerequisites run left to right even under -j: setup has to finish before cargo starts, which is parallel by itself.
.NOTPARALLEL:
.DEFAULT_GOAL = help
.PHONY: help demo test setup model build check clean install

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

install: ## Install the binary for this user
	$(CARGO) install --path . --locked

# The fetched model stays: it is an input, and 98 MB to get again.
clean: ## Remove what was built and the demo's output
	$(CARGO) clean
	rm -f $(PRUNED)
