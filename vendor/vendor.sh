#!/bin/sh
# Copies the source of every dependency in Cargo.lock to vendor/crates. Needs a network; see vendor/README.md.
# Arguments go to cargo vendor: --respect-source-config where a cargo config file replaces the default registry,
# which cargo vendor otherwise ignores.
set -eu

cd "$(dirname "$0")/.."
# Standard output is a config snippet that vendor/config.toml already holds; progress goes to standard error.
cargo vendor --locked "$@" vendor/crates >/dev/null
