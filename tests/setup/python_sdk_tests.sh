#!/usr/bin/env bash
# Fetches the integration tests that the Python SDK ships in its source distribution, unpacks them
# below .cache/, and makes the virtual environment that they run in. Both only once.
set -euo pipefail

version=0.25.0
here=$(cd "$(dirname "$0")" && pwd)
cache=$(cd "$here/../.." && pwd)/.cache
source=$cache/iii_sdk-$version
venv=$cache/sdk-venv
requirements=$here/sdk-requirements.txt
mkdir -p "$cache"

if [ ! -d "$source/tests" ]; then
    download=$(mktemp -d "$cache/download.XXXXXX")
    trap 'rm -rf "$download"' EXIT
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --no-binary iii-sdk \
        --dest "$download" "iii-sdk==$version"
    tar -xzf "$download/iii_sdk-$version.tar.gz" -C "$download"
    rm -rf "$source"
    mv "$download/iii_sdk-$version" "$source"
fi

if ! cmp -s "$requirements" "$venv/installed-requirements.txt"; then
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --no-deps --requirement "$requirements"
    "$venv/bin/python" -m pip check >/dev/null
    cp "$requirements" "$venv/installed-requirements.txt"
fi
