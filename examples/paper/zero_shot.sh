#!/usr/bin/env bash
exec bash "$(dirname "$0")/table.sh" zero_shot "$@"
