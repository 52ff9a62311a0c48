#!/bin/sh
# Installs the operator beside its packages, and starts it once: that proves the parts fit, and leaves the bytecode of what a
# start imports, which a read-only file system could not keep.
set -eu

environment=/opt/pagedserve
(cd operator && /opt/tools/bin/hatchling build --target wheel --directory /tmp/wheel)
/opt/tools/bin/uv pip install --python "$environment/bin/python" --no-deps --no-index /tmp/wheel/*.whl

# The client brings a class for each kind and a method for each call, 70 MB that load on first use. The operator speaks in
# plain objects through the dynamic client. One that imported such a class would fail to start on the next line.
site="$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
rm "$site"/kubernetes/client/api/*_api.py "$site"/kubernetes/client/models/v?*.py
rm "$site"/kubernetes/aio/client/api/*_api.py "$site"/kubernetes/aio/client/models/v?*.py
"$environment/bin/pagedserve-operator" --help

# What uv left for itself; the lock is writable for all.
rm -f "$environment/.lock" "$environment/.gitignore" "$environment/CACHEDIR.TAG"
