#!/usr/bin/env bash
# Build .venv from requirements.lock. `make setup` and every target that needs the environment call this, so it says
# and does nothing when nothing has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf 'setup: %s\n' "$*"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# With no PYTHON named, a finished .venv keeps its interpreter: `make setup PYTHON=python3.12`, then `make test`.
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    if [[ -e .venv/stamp ]] && .venv/bin/python -c '' 2>/dev/null; then python=.venv/bin/python; fi
fi

# A virtual environment remembers its interpreter and its own path: when either differs it is of no use.
origin="$PWD: $("$python" -I -c 'import sys; print(sys.base_prefix, *sys.version_info[:3])')"
wanted="$origin
$(cat requirements.lock packages/*/pyproject.toml tools/setup.sh)"
if [[ $wanted == "$(cat .venv/stamp 2>/dev/null)" ]]; then exit 0; fi

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; then
    say "mics needs Python 3.11 to 3.14, got $("$python" -V) from PYTHON=$python: try make setup PYTHON=python3.11" >&2
    exit 1
fi
say "builds .venv in four stages, which takes half a minute, and minutes where packages must be downloaded"
rm -f .venv/stamp  # from here to the last line, a failure leaves no stamp
if [[ $origin != "$(cat .venv/origin 2>/dev/null)" ]]; then
    say "1 of 4: a new .venv with $("$python" -V)"
    "$python" -m venv --clear .venv
    echo "$origin" >.venv/origin
else
    say "1 of 4: .venv is there, with $("$python" -V)"
fi

if [[ $(uname) != Linux || $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
    say "2 and 3 of 4: the locked packages, on Linux with those of CUDA (several GB)"
    pip install -qq -r requirements.lock
else
    # The torch of the package index brings several GB of CUDA libraries, the lock's nvidia-* and cuda-* lines, even
    # where there is no GPU. Its CPU build needs none of them, and counts as the locked version.
    torch=$(grep -o '^torch==[0-9.]*' requirements.lock)
    say "2 of 4: no NVIDIA GPU here, so the CPU build of $torch (200 MB)"
    if ! pip install -qq --no-deps "$torch+cpu" 2>/dev/null; then
        say "pip is not configured with such a build; uv knows where torch keeps them"
        pip install -qq "$(grep -o '^uv==[0-9.]*' requirements.lock)"
        .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --torch-backend=cpu "$torch"
    fi
    say "3 of 4: the other locked packages"
    pip install -qq -r <(grep -Ev '^(cuda|nvidia)-' requirements.lock)
fi

say "4 of 4: the three packages of mics, editable"
pip install -qq --no-deps --no-build-isolation -e packages/mics-kernels -e packages/mics-core -e packages/mics-models
printf '%s\n' "$wanted" >.venv/stamp
say "done: make help lists what can be done now"
