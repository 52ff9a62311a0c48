#!/bin/sh
# Prepares the build stage: uv, hatchling and the SBOM's writer in /opt/tools, by hash, and the Debian packages given.
set -eu

wanted="$*"
# Debian's Python comes without venv and headers; one that was put into /usr/local has both.
if dpkg --search "$(readlink -f "$(command -v python3)")" >/dev/null 2>&1; then
    wanted="$wanted python3-venv python3-dev"
fi
if [ -n "$wanted" ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # shellcheck disable=SC2086 # words
    apt-get install --yes --no-install-recommends $wanted
fi

if [ -f /run/secrets/ca.crt ]; then
    export PIP_CERT=/run/secrets/ca.crt
fi
python3 -m venv /opt/tools
/opt/tools/bin/pip install --no-cache-dir --disable-pip-version-check --only-binary :all: --require-hashes \
    --requirement /mnt/tools.txt
