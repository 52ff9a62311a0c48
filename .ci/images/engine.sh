#!/bin/sh
# Installs the engine, kernels compiled, beside its packages, and starts it once: that proves the parts fit, and leaves
# the bytecode of what a start imports, which a read-only file system could not keep.
set -eu

environment=/opt/pagedserve
(cd engine && /opt/tools/bin/hatchling build --target wheel --directory /tmp/wheel)
/opt/tools/bin/uv pip install --python "$environment/bin/python" --no-deps --no-index /tmp/wheel/*.whl
site="$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
if [ ! -f "$site/pagedserve_engine/native/kernels.so" ]; then
    echo "the kernels for processors were not compiled: the lines above say why" >&2
    exit 1
fi

# Triton compiles one C file, its link to the CUDA driver, with the compiler that CC names. The image has none: the link is
# compiled here, and CC names a script that hands it out.
if [ -d "$site/triton/backends/nvidia" ]; then
    headers="$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')"
    # The driver comes with the GPU's node; its name is enough to link against.
    gcc -shared -Wl,-soname,libcuda.so.1 -o /tmp/libcuda.so.1 -x c /dev/null
    gcc "$site/triton/backends/nvidia/driver.c" -O3 -shared -fPIC -Wno-psabi -I"$site/triton/backends/nvidia/include" \
        -I"$headers" -L/tmp -Wl,--no-as-needed -l:libcuda.so.1 -o "$environment/lib/triton-driver.so"
fi
cat > "$environment/bin/triton-driver" <<'SCRIPT'
#!/bin/sh
# Stands where Triton expects a C compiler; the one file that it compiles was compiled with the image.
set -eu
source="$1"
while [ "$#" -gt 1 ] && [ "$1" != -o ]; do shift; done
case "$source" in
*/triton/backends/nvidia/driver.c) cp /opt/pagedserve/lib/triton-driver.so "$2" ;;
*) echo "this image has no C compiler, and $source is not Triton's driver: name one in CC" >&2 && exit 1 ;;
esac
SCRIPT
chmod 755 "$environment/bin/triton-driver"

CACHE_DIR=/tmp/converted "$environment/bin/pagedserve-engine" plan-memory --device cpu
rm -r /tmp/converted
"$environment/bin/python" -c 'import pagedserve_engine.server.app, pagedserve_engine.frontend'
if [ -d "$site/triton" ]; then
    "$environment/bin/python" -c 'import pagedserve_engine.attention.triton, pagedserve_engine.kernels.ops, pagedserve_engine.kernels.sampling'
    # Triton's own call of the compiler, as its first kernel makes it: a version that asks for something else fails here.
    compiled="$(CC="$environment/bin/triton-driver" TRITON_CACHE_DIR=/tmp/triton "$environment/bin/python" -c '
import triton.backends.nvidia.driver as nvidia
from triton.runtime.build import compile_so_from_file
source = nvidia.dirname + "/driver.c"
print(compile_so_from_file(source, "cuda_utils", include_dirs=nvidia.include_dirs, libraries=nvidia.libraries))')"
    cmp "$compiled" "$environment/lib/triton-driver.so"
    rm -r /tmp/triton
fi

# What uv left for itself; the lock is writable for all.
rm -f "$environment/.lock" "$environment/.gitignore" "$environment/CACHEDIR.TAG"
