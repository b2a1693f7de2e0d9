#!/usr/bin/env bash
# Installs the npm packages of tests/node as its lock file names them.
#
# Asks no server when node_modules was made from this very lock, else takes what npm has in its
# cache before it downloads. No package runs a script of its own: none of those used needs one.
set -euo pipefail

cd "$(dirname "$0")/../node"
stamp=node_modules/.installed-lock
if cmp -s package-lock.json "$stamp"; then
    exit 0
fi
npm ci --prefer-offline --ignore-scripts --no-audit --no-fund --loglevel=error
cp package-lock.json "$stamp"
