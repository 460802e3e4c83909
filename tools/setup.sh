# Sourced by run_demo.sh and run_tests.sh: sets PYTHON to an interpreter that has what $REQUIREMENTS (files) ask for.
# A PYTHON that is set already is taken as it is; otherwise .venv is made once and kept up to date.
if [ -z "${PYTHON:-}" ]; then
    wanted=$(cat $REQUIREMENTS | cksum)
    if ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
        echo "installing into .venv (about two minutes and 6 GB, once)"
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' $REQUIREMENTS)
        echo "$wanted" >> .venv/installed  # of the demo and of the tests, which ask for more
    fi
    PYTHON=.venv/bin/python
fi
