#!/bin/sh
# Make, once, what the services of compose.yaml need to trust each other. Each secret lies in a
# directory of its own, so that a service can be given that one alone:
#   server/keys.json    hashes of both keys; server/pgpass: the database's password, as libpq wants it
#   scrape/scrape.key   for Prometheus: the scope metrics
#   load/load.key       for the load generator: the scope chat
#   database/password   for PostgreSQL
# Usage: make-keys.sh [DIRECTORY]
set -eu
keys=${1:-/keys}
umask 022

make_key() {  # id, file, options of `pilothouse keys create`
    id=$1 file=$2
    shift 2
    [ -s "$file" ] && return
    # A key whose secret was never written is of no use to anybody.
    pilothouse keys revoke "$id" --keys "$keys/server/keys.json" >/dev/null 2>&1 || true
    pilothouse keys create "$id" --keys "$keys/server/keys.json" "$@" >"$file.new" 2>/dev/null
    mv "$file.new" "$file"
}

make_key prometheus "$keys/scrape/scrape.key" --scope metrics
make_key loadtest "$keys/load/load.key"
if ! [ -s "$keys/database/password" ]; then
    python -c 'import secrets; print(secrets.token_hex(24))' >"$keys/database/password.new"
    mv "$keys/database/password.new" "$keys/database/password"
fi
# libpq reads a password file only if nobody else can.
(umask 077 && echo "postgres:5432:*:pilothouse:$(cat "$keys/database/password")" >"$keys/server/pgpass")
