#!/bin/sh
# `make test`: every check and every suite, one after the other; a summary at the end; fails if any part failed.
# Arguments after the environment's folder go to every pytest run.
set -u
bin=$1/bin
shift
summary=
failed=0

part() {
    name=$1
    shift
    printf '\n== %s\n' "$name"
    began=$(date +%s)
    if "$@" </dev/null; then
        word=passed
    else
        word=FAILED
        failed=1
    fi
    summary="$summary$(printf '%-14s %s  %4d s' "$name" "$word" $(($(date +%s) - began)))
"
}

part ruff "$bin/ruff" check .
part format "$bin/ruff" format --check .
part pyright "$bin/pyright"
part imports "$bin/lint-imports"
for folder in unit conformance integration actors cluster chaos browser; do
    # A process of its own for each: a Ray of one suite must not meet that of another.
    if ls tests/$folder/test_*.py >/dev/null 2>&1; then
        part "$folder" "$bin/pytest" "tests/$folder" -q -m "not slow" "$@"
    fi
done
part web-client sh deploy/web.sh test "${bin%/bin}"
part python-client "$bin/pytest" clients/python/tests -q "$@"

printf '\n== summary\n%s' "$summary"
exit $failed
