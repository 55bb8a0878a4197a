#!/usr/bin/env bash
exec bash "$(dirname "$0")/table.sh" gates "$@"
