# Sourced by run_demo.sh and run_tests.sh: sets PYTHON to an interpreter that has what $REQUIREMENTS (files) ask for.
# A PYTHON that is set already is taken as it is; otherwise .venv is made once and kept up to date.
if [ -z "${PYTHON:-}" ]; then
    wanted=$(cat $REQUIREMENTS | cksum)
    if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        echo "installing into .venv (about two minutes and 6 GB, once)"
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' $REQUIREMENTS)
        echo "$wanted" > .venv/installed
    fi
    PYTHON=.venv/bin/python
fi
