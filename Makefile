# make run    the whole chain on the embedded faces, and where its report lies
# make test   every notebook as a test, the export check, ruff, pytest
# make help   the rest

PYTHON ?= python3
BIN    := .venv/bin

.PHONY: run test install notebooks sync lint pytest bench results lab clean help

run: install
	$(BIN)/fer-nb run --profile embedded

test: install sync lint notebooks pytest

install: .venv/.installed

# On Linux the package asks for opencv-python-headless, which runs on bare servers; where libGL.so.1 is there, the build with windows takes its place.
.venv/.installed: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]'
	@if [ "$$(uname)" = Linux ] && $(BIN)/python -c 'import ctypes; ctypes.CDLL("libGL.so.1")' 2>/dev/null; then \
	  version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("opencv-python-headless"))'); \
	  $(BIN)/python -m pip uninstall --quiet --yes opencv-python-headless && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "opencv-python==$$version"; fi
	@touch $@

sync:
	$(BIN)/python -m pytest -q tests/test_export.py

lint:
	$(BIN)/ruff check fer_nb tests

notebooks:
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing

pytest:
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q --durations=5 --ignore=tests/benchmarks --ignore=tests/test_export.py

bench: install
	$(BIN)/python -m pytest -q tests/benchmarks

results: install
	$(BIN)/python -c 'from fer_nb.results import write_results; print(write_results("runs/reference", readme="README.md"))'

lab: install
	$(BIN)/jupyter lab nbs

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make bench  measure speeds, such as those of runs/reference/RESULTS.md"
	@echo "make results  make runs/reference/RESULTS.md and the README's table again from the artifacts"
	@echo "make lab    open the notebooks in JupyterLab"
	@echo "make clean  remove .venv and build leftovers (runs/ stays)"
