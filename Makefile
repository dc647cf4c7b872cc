# Everything below works from a fresh clone with Python 3.11-3.13 and a C++ compiler; without the compiler it works too,
# minus semantica._C. Where there is a GPU and nvcc, semantica._cuda is built for that GPU as well. To take torch from
# another index, set pip's own PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off --no-compile -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt semantica/nvcc.py $(wildcard csrc/*.* csrc/cuda/*)

# a process for each core, whole files at a time, since tests of a file share what they prepare
SPREAD := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# pip compiles nothing, which halves the install; so what is imported must be kept compiled, whatever the shell says
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow lint clean

demo: $(VENV)/installed
	$(BIN)/semantica demo

test: $(VENV)/installed-test
	$(BIN)/pytest -q $(SPREAD) -m "not slow"

test-slow: $(VENV)/installed-slow
	$(BIN)/pytest -q $(SPREAD) -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist demo *.egg-info semantica/_C.* semantica/_cuda.* .pytest_cache .ruff_cache .hypothesis .benchmarks
	find semantica kernels train export benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit( \
	  "Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d: choose another with make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

# torch by itself and exactly first, so that a CPU build of this version is kept by everything that follows
$(VENV)/installed: $(SOURCES) $(VENV)/created
	$(PIP) torch==2.13.0 'setuptools>=77' pybind11
	$(PIP) --no-build-isolation -e '.[train,bench,export]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) 'semantica-diffusion[pairs,serve,test]'
	touch $@

# Ray, ModelOpt, and TensorRT-RTX, which builds engines for consumer GPUs and needs none: too large for the quick tests
$(VENV)/installed-slow: $(VENV)/installed-test
	$(PIP) 'semantica-diffusion[ray,serve-ray,quantise]'
	[ "$$(uname -sm)" != "Linux x86_64" ] || $(PIP) 'semantica-diffusion[tensorrt-rtx]'
	touch $@
