#!/usr/bin/env bash
# WMT14, English to German: see recipes/wmt14/evaluate.sh --help
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../wmt14/evaluate.sh" de "$@"
