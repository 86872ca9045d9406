#!/usr/bin/env bash
# Make .venv from requirements.lock. Usage: pipelines/bootstrap.sh [nerfstudio] [peers]   the optional extras to install
# Needs only Python 3.11-3.13 with venv, and a C++ compiler; says in one line which is missing and how to get it.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "resparse: $1" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3.13 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 among '${PYTHON:-python3}' (found: $(${PYTHON:-python3} --version 2>/dev/null | head -n 1)). \
Get one: sudo apt install python3 python3-venv, or name one with make PYTHON=/path/to/python3.12 ..."
}

check_compiler() {
    local cxx=${CXX:-c++} version
    command -v "$cxx" >/dev/null ||
        fail "no C++ compiler ('$cxx' not found); the kernels are C++17. Get one: sudo apt install g++"
    version=$("$cxx" -dumpversion 2>/dev/null | cut -d. -f1)
    [ "${version:-0}" -ge 9 ] ||
        fail "the C++ compiler '$cxx' is version ${version:-unknown}; GCC 9 or Clang 9 is the oldest that builds the kernels. \
Get one: sudo apt install g++, or name one with CXX=..."
}

# A killed installation must not look finished, and an unchanged one must cost nothing: the stamp is written last.
python=$(find_python)
check_compiler
stamp=.venv/installed lock=$(sha256sum requirements.lock | cut -d' ' -f1)
read -r seen installed 2>/dev/null < "$stamp" || true
wanted=$(printf '%s\n' ${installed:-} "$@" | sort -u | xargs) # what a user installed once stays
[ "${seen:-}" = "$lock" ] && [ "${installed:-}" = "$wanted" ] && exit 0

if ! [ -x .venv/bin/python ]; then
    # without ensurepip (Debian splits it off) venv leaves a half-made folder behind
    "$python" -m venv .venv 2>/dev/null || { rm -rf .venv; fail "$python has no venv module. Get it: sudo apt install python3-venv"; }
fi
echo "resparse: installing the locked environment into .venv (about 9 GB; the first time takes a few minutes)"
if ! [ -x .venv/bin/uv ]; then
    # the installer itself comes from the lock too, hash and all
    awk '/^uv==/ {inside = 1} inside {print} inside && !/\\$/ {exit}' requirements.lock > .venv/uv.lock
    .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r .venv/uv.lock
fi
excludes=()
for extra in nerfstudio peers; do
    [[ " $wanted " == *" $extra "* ]] || excludes+=(--excludes "locks/$extra.txt")
done
.venv/bin/uv pip install -q --python .venv/bin/python --require-hashes -r requirements.lock "${excludes[@]}"
echo "$lock $wanted" > "$stamp"
