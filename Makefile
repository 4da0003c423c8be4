# The everyday commands. The first of them to run makes .venv and installs this checkout in it, editable; later
# runs need no network until pyproject.toml changes. PYTHON=... chooses the interpreter.
PYTHON = python3
VENV = .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: help demo test lint typecheck bench docs clean

help:
	@echo "make demo       train the digits example and show what the compiler made of it"
	@echo "make test       run the tests"
	@echo "make lint       check the style with ruff"
	@echo "make typecheck  check the types with mypy"
	@echo "make bench      measure training steps, kernels and overhead; the report goes to out/bench"
	@echo "make docs       write docs/ops.md from the docstrings and the op table"
	@echo "make clean      remove .venv and everything else that was built"

demo: $(VENV)/installed-plot
	$(VENV)/bin/graphflow run digits

# A crash of native code ends the run: with workers restarted, pytest-xdist 3.8 was seen to wait for ever.
test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadgroup --max-worker-restart 0 tests

lint: $(VENV)/installed-test
	$(VENV)/bin/python -m ruff check .

# The packages lie in folders that are not named as they are installed; mypy needs them laid out that way.
typecheck: $(VENV)/installed-test
	rm -rf build/typecheck
	mkdir -p build/typecheck/graphflow
	for entry in graphflow/* compiler runtime examples; do \
	  ln -s "$(CURDIR)/$$entry" build/typecheck/graphflow/ || exit 1; \
	done
	cd build/typecheck && ../../$(VENV)/bin/python -m mypy --config-file ../../pyproject.toml \
	  --cache-dir ../../.mypy_cache

# BENCH="--python PATH" names a Python that has PyTorch and JAX to compare with; bench.py --help lists the rest.
bench: $(VENV)/installed-plot
	$(VENV)/bin/python benchmarks/bench.py $(BENCH)

docs: $(VENV)/installed-test
	$(VENV)/bin/python -m graphflow.docs > docs/ops.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment

$(VENV)/installed-plot: pyproject.toml | $(VENV)/bin/python
	$(PIP) install "pip>=21.3"
	$(PIP) install --editable ".[plot]"
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(PIP) install "pip>=21.3"
	$(PIP) install --editable ".[test,plot]"
	@touch $@ $(VENV)/installed-plot

# A failed `-m venv` leaves a half-made folder behind (Debian without python3-venv does), so each try starts afresh.
$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || \
	  { echo "graphflow: no '$(PYTHON)' on the PATH; install Python 3.10 or later, or say make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(CHECK_PLATFORM)'
	@rm -rf $(VENV); "$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 || \
	  { rm -rf $(VENV); "$(PYTHON)" -m virtualenv $(VENV) >/dev/null 2>&1; } || \
	  { rm -rf $(VENV); virtualenv --python "$(PYTHON)" $(VENV) >/dev/null 2>&1; } || \
	  { rm -rf $(VENV); uv venv --seed --python "$(PYTHON)" $(VENV) >/dev/null 2>&1; } || \
	  { rm -rf $(VENV); echo "graphflow: $(PYTHON) can make no virtual environment; install venv for it" \
	    "(on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(VENV)/bin/python -m ensurepip >/dev/null 2>&1 || \
	  { rm -rf $(VENV); echo "graphflow: the virtual environment has no pip, and ensurepip is absent" \
	    "(on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# One line, and syntax that every Python since 2.7 reads: an old one must get the sentence too.
CHECK_PLATFORM = import platform as p, sys; s = p.system(); m = p.machine().lower(); \
  ok = s in ("Linux", "Darwin") and m in ("x86_64", "amd64", "arm64", "aarch64") and sys.maxsize > 2**32; \
  ok and sys.version_info >= (3, 10) or sys.exit("graphflow: needs Python 3.10 or later, 64-bit, on Linux or " \
  "macOS on x86-64 or arm64; this is Python " + p.python_version() + " on " + s + " " + m)
