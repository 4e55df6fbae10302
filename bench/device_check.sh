#!/usr/bin/env bash
# What a GPU says to spilld, in less than ten minutes: cuda_ext/CHECK.md. Runs this tree as it is, installs nothing
# and needs no network. Options are those of bench/device_check.py; PYTHON is what it runs under; OUT takes the logs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OUT=${OUT:-build/device_check}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$PWD/build/device_check/cache} # of CUBINs, so that a second run compiles none
unset SPILLD_TEST_CACHE

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
mkdir -p "$OUT" "$site/spilld" "$site/spilld-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: spilld\nVersion: %s\n' "$version" >"$site/spilld-$version.dist-info/METADATA"
for part in daemon offload cuda_ext; do ln -s "$PWD/$part" "$site/spilld/$part"; done
if compgen -G '.whl/*.whl' >/dev/null; then
    timeout --kill-after 5 60 "$python" -m pip --isolated install -q --disable-pip-version-check --no-index --no-deps \
        --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || echo "== .whl cannot be unpacked: going on without"
fi
export PYTHONPATH=$site:$PWD:$PWD/bench PYTHONUNBUFFERED=1

"$python" bench/device_check.py "$@" && status=0 || status=$?
exit "$status"
