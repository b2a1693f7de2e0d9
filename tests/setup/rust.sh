#!/usr/bin/env bash
# Builds tests/rust below .cache/, so that no test has to wait for it. Does nothing without cargo:
# the tests that need the program are then skipped.
set -euo pipefail

cd "$(dirname "$0")/../rust"
if ! command -v cargo >/dev/null; then
    echo "cargo is not installed: the tests of the Rust SDK will be skipped"
    exit 0
fi
CARGO_TARGET_DIR=../../.cache/rust-target cargo build --quiet
