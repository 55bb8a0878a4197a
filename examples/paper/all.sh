#!/usr/bin/env bash
# Every table; README.md says how long that takes.
exec bash "$(dirname "$0")/table.sh" main block_size gates keys aggregates balance expansion zero_shot routing scaling factors "$@"
