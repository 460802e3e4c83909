# Sourced by the run_*.sh scripts: sets PYTHON to an interpreter that has what the given requirements files ask for.
# A PYTHON that is set already is taken as it is; otherwise .venv is made once and kept up to date.
if [ -z "${PYTHON:-}" ]; then
    stamp=.venv/installed
    wanted=$(cat "$@" | cksum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "installing into .venv (about two minutes and 6 GB, once)"
        python3 -m venv .venv
        for file in "$@"; do set -- "$@" -r "$file"; shift; done
        .venv/bin/pip install --quiet --disable-pip-version-check "$@"
        echo "$wanted" > "$stamp"
    fi
    PYTHON=.venv/bin/python
fi
