#!/bin/sh
# Gives the base what both components stand on: a Python that they run on, and the certificates that clients trust.
set -eu

wanted=""
command -v python3 >/dev/null || wanted="python3"
[ -e /etc/ssl/certs/ca-certificates.crt ] || wanted="$wanted ca-certificates"
if [ -n "$wanted" ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # shellcheck disable=SC2086 # words
    apt-get install --yes --no-install-recommends $wanted
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/*.log
fi

if ! python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
    echo "BASE_IMAGE has $(python3 --version): give one with Python 3.11 to 3.13 (Debian 12 and 13 have one)" >&2
    exit 1
fi
