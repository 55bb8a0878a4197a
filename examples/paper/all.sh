#!/usr/bin/env bash
# Every table: about 15 hours of a core at laptop scale.
exec bash "$(dirname "$0")/table.sh" main block_size keys aggregates balance expansion zero_shot routing scaling factors "$@"
