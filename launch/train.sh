#!/usr/bin/env bash
# Trains in this process, with the flags that llava_jax/xla_flags.py has for the platform. Every launcher ends here.
#
#   launch/train.sh PLATFORM [FLAGS OF llava_jax.main]
#
# $LLAVA_PYTHON is the interpreter, by default that of .venv.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${LLAVA_PYTHON:-.venv/bin/python}"

flags="$("$PYTHON" -m llava_jax.xla_flags "${1:-}")"
eval "$flags"
shift
exec "$PYTHON" -m llava_jax.main "$@"
