## stepkit: the paper "Spatio-Temporal Perturbations for Video Attribution" as a repository that runs.
##
## Each command makes the Python environment itself, once. It takes the virtual or conda environment
## that is active, or the one of PYTHON=..., if that has the packages; otherwise it makes .venv here.
##
# GNU make 3.81 (macOS) and later, POSIX sh. `make` alone prints the lines with two hashes.

PROFILE = quick
DATA =
ONLY =
SET =
BENCH =
PYTHON ?=

# See docs/speed.md: idle threads sleep; freed memory is kept for the next pass (glibc reads these).
export GOMP_SPINCOUNT ?= 10000
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296

# The shell reads these as variables: blanks, brackets and quotes in them stay as they are.
export DATA SET

# One stamp per environment that could be meant, so that activating another one is noticed. It holds
# the path of the interpreter; a stamp whose interpreter is gone (rm -r .venv) counts for nothing.
WHERE := $(shell printf '%s' "$(PYTHON)|$$VIRTUAL_ENV|$$CONDA_PREFIX" | cksum | cut -d ' ' -f 1)
STAMP := .make/$(WHERE)
$(shell test -x "$$(cat $(STAMP) 2>/dev/null)" || rm -f $(STAMP))
# This clone, whatever is linked into the environment; nothing may be, where there is no pip.
RUN = PYTHONPATH="$$PWD$${PYTHONPATH:+:$$PYTHONPATH}" "$$(cat $(STAMP))"

# Tests that use every package without a browser, real videos, trained networks or notebooks.
FAST = attribution cam clips colours explorer kernels models properties relevance removal \
    reproduce setup stats sweep viz xrai
OLDEST = .venv-oldest/bin/python

.PHONY: help env reproduce test test-oldest bench lint format notebooks lab clean

help: ## print this
	@sed -n 's/^## \{0,1\}//p' Makefile
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  make reproduce PROFILE=gpu            another size; params/ holds one file per profile"
	@echo "  make reproduce DATA=/path/to/videos   where the profile's videos are"
	@echo "  make reproduce ONLY='01 03'           only these notebooks"
	@echo "  make reproduce SET='seed=1 clips=4'   other values for parameters of the notebooks,"
	@echo "  make reproduce SET='seeds=[1, 2]'     as in YAML"
	@echo "  make bench BENCH='iteration figure'   only these scripts of benchmarks/"

env: $(STAMP) ## find or make the environment (3 to 7 minutes the first time)
	@echo "env: $$(cat $(STAMP))"

# Any Python from 3.11 can start this; tools/environment.py then decides which one is used.
$(STAMP): requirements.lock pyproject.toml tools/environment.py
	@for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11); do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	    exec "$$python" tools/environment.py $@ $(if $(PYTHON),--asked); \
	done; \
	echo "stepkit needs Python 3.11 or newer; $(if $(PYTHON),$(PYTHON) is none,none was found)." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

reproduce: $(STAMP) ## run every notebook; tables and figures in runs/<profile>/report.html
	@$(RUN) -m stepkit reproduce --profile "$(PROFILE)" $(if $(DATA),--data "$$DATA") \
	    $(if $(ONLY),--only $(ONLY)) $(if $(SET),--set "$$SET")

test: lint ## lint, then the tests of tests/, then every notebook against its stored outputs
	@echo "test: tests/"
	@$(RUN) -m pytest tests
	@if ls notebooks/*.ipynb >/dev/null 2>&1; then \
	    echo "test: notebooks/, as stored, each cell again (up to 10 minutes on two cores)"; \
	    $(RUN) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 \
	        --nbval-sanitize-with tests/sanitize.cfg --timeout 900 notebooks; \
	else \
	    echo "test: notebooks/ holds no notebook yet, nothing to re-run"; \
	fi

test-oldest: $(STAMP) ## the fast tests with the lowest versions allowed, in .venv-oldest (6 GB)
	@$(RUN) -m venv --clear .venv-oldest
	@$(OLDEST) -m pip install --quiet uv
	@$(OLDEST) -m uv pip install --python $(OLDEST) --resolution lowest-direct \
	    --requirements pyproject.toml --all-extras --editable .
	@$(OLDEST) -m ruff check .
	@$(OLDEST) -m pytest $(FAST:%=tests/test_%.py) \
	    --deselect tests/test_sweep.py::test_dask_replaces_a_worker_that_dies

bench: $(STAMP) ## measure what is said of speed, into results/benchmarks.csv (an hour; see BENCH)
	@for name in $(or $(BENCH),iteration parts batch methods scaling memory sweep precision fast figure); do \
	    echo "bench: benchmarks/$$name.py"; \
	    set --; [ $$name = fast ] && [ -n "$$DATA" ] && set -- --data "$$DATA"; \
	    $(RUN) benchmarks/$$name.py "$$@" || exit 1; \
	done

lint: $(STAMP) ## check format and style, notebooks included
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .

format: $(STAMP) ## mend format and what ruff can mend by itself
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

notebooks: $(STAMP) ## run the default profile and store its outputs in notebooks/*.ipynb
	@$(RUN) -m stepkit reproduce $(if $(ONLY),--only $(ONLY))
	@$(RUN) -m tools.store $(if $(ONLY),--only $(ONLY))

lab: $(STAMP) ## open the notebooks in JupyterLab
	@JUPYTER_PREFER_ENV_PATH=1 $(RUN) -m jupyterlab notebooks

clean: ## remove caches and build leftovers; runs/ and .venv* stay, delete them by hand
	rm -rf .make build dist .pytest_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name runs -prune -o -name .git -prune -o \
	    \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
