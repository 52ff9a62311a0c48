#!/bin/sh
# Installs everything of a component but itself into /opt/pagedserve, exactly as uv.lock says: packages.sh engine|operator
#
# The engine brings the small model. For VARIANT=cpu, Triton and CUDA's packages stay away: torch comes from TORCH_INDEX in
# its build for processors, or else it is the locked one, whose missing libraries get stand-ins (without_cuda.py).
set -eu

export UV_PROJECT_ENVIRONMENT=/opt/pagedserve UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy
if [ -f /run/secrets/ca.crt ]; then
    export SSL_CERT_FILE=/run/secrets/ca.crt
fi

# Options that leave out the locked packages whose whole name matches $1 and not $2.
without() {
    sed -n 's/^name = "\(.*\)"$/\1/p' uv.lock | grep -xE "$1" | grep -vxE "$2" | sed 's/^/--no-install-package=/'
}

install_locked() {
    uv_python="$(command -v python3)"
    /opt/tools/bin/uv sync --frozen --no-build --no-install-workspace --python "$uv_python" "$@"
}

case "$1 ${VARIANT:-}" in
"operator ")
    install_locked --no-dev --package pagedserve-operator
    ;;
"engine cuda")
    install_locked --only-group demo
    ;;
"engine cpu")
    if [ -n "${TORCH_INDEX:-}" ]; then
        # shellcheck disable=SC2046 # words
        install_locked --only-group demo $(without 'torch|triton|(cuda|nvidia)-.*' '')
        version="$(sed -n '/^name = "torch"$/{n;s/^version = "\(.*\)"$/\1/p}' uv.lock)"
        /opt/tools/bin/uv pip install --python /opt/pagedserve/bin/python --no-build --no-deps \
            --default-index "$TORCH_INDEX" "torch==$version+cpu"
    else
        # shellcheck disable=SC2046 # words
        install_locked --only-group demo $(without 'triton|(cuda|nvidia)-.*' 'nvidia-cuda-(runtime|cupti)')
        /opt/pagedserve/bin/python /mnt/without_cuda.py
    fi
    ;;
*)
    echo "VARIANT is '${VARIANT:-}': give cuda or cpu" >&2
    exit 2
    ;;
esac
