#!/usr/bin/env bash
# WMT14, English to French: see recipes/wmt14/train.sh --help
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../wmt14/train.sh" fr "$@"
