# make run    the whole chain on the embedded faces, and where its report lies
# make quick  the same in a hurry: one seed, two small teachers
# make test   every notebook as a test, the export check, ruff, mypy, pytest in two processes (JOBS=0: in one)
# make help   the rest

PYTHON ?= python3
BIN    := .venv/bin
JOBS   ?= 2

.PHONY: run quick test install notebooks sync lint pytest bench results report constraints lab clean help gallery docs

run: install
	$(BIN)/fer-nb run --profile embedded

quick: install
	$(BIN)/fer-nb run --profile quick

test: install sync lint notebooks pytest docs

install: .venv/.installed

# opencv-python needs libGL.so.1, which bare servers lack: there the headless build of the same version takes its place.
.venv/.installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("opencv-python"))'); \
	  echo "libGL.so.1 is missing: opencv-python-headless $$version takes the place of opencv-python (no windows; all else works)"; \
	  $(BIN)/python -m pip uninstall --quiet --yes opencv-python && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "opencv-python-headless==$$version"; }
	@touch $@

sync:
	$(BIN)/python -m pytest -q tests/test_export.py

lint:
	$(BIN)/ruff check fer_nb tests
	$(BIN)/mypy

notebooks:
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing

pytest:
	OMP_WAIT_POLICY=PASSIVE FER_NB_CLEAN_VENV=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations=25 --ignore=tests/benchmarks --ignore=tests/test_export.py

bench: install
	$(BIN)/python -m pytest -q tests/benchmarks

results: install
	$(BIN)/python -c 'from fer_nb.results import write_results; print(write_results("runs/reference", readme="README.md", guide="docs/USE.md"))'

report: install
	$(BIN)/fer-nb report --runs runs/reference/gpu runs/reference/fer2013 runs/reference/label_noise runs/reference/nl_matrix runs/reference/corruption --out report/reference --engine pandoc

docs: install
	$(BIN)/python workflow/docs_site.py

gallery: install
	$(BIN)/python workflow/gallery.py

constraints: install
	$(PYTHON) -m venv .venv/uv && .venv/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python workflow/constraints.py .venv/uv/bin/uv $(if $(NEWEST),--newest)

lab: install
	$(BIN)/jupyter lab nbs

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make bench  measure speeds, such as those of runs/reference/RESULTS.md"
	@echo "make results  make runs/reference/RESULTS.md, the README's table and the guide's again"
	@echo "make report  make report/reference again, the report of the reference runs"
	@echo "make docs  render notebooks, API and guides as a site in _docs/, and follow every link of it"
	@echo "make gallery  draw the pictures of docs/GALLERY.md again"
	@echo "make constraints  make constraints.txt again, from what is installed; with NEWEST=1 the newest that settings.ini allows"
	@echo "make lab    open the notebooks in JupyterLab"
	@echo "make clean  remove .venv and build leftovers (runs/ stays)"
