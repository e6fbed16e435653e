# Each target works alone on a fresh machine: it makes the environment that it needs.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build; unpinned, pip takes gigabytes of CUDA libraries.
TORCH  ?= torch==2.13.0
# What runs the targets for a GPU.
GPU    ?= $(VENV)-gpu/bin/python
# Where the lock's CPU build is: a page with links, or a folder.
TORCHS ?= https://download.pytorch.org/whl/cpu/torch/

.PHONY: demo test test-all test-gpu bench-gpu test-versions test-jax dist bench workloads parity docs pictures choosing ahead-of-time lint lint-workflows lock clean

demo: $(VENV)/.demo  ## train one CNN four ways and compare
	$(BIN)/python -m examples.digits

test: $(VENV)/.dev  ## the tests, but for the slow ones
	$(BIN)/python -m pytest -n 2 -m "not slow" --quick

test-all: $(VENV)/.dev  ## every test, those that compile for a TPU and a GPU and those of the frameworks included
	$(BIN)/python -m pip install -q $(TORCH) -e ".[aot,browser,ecosystem,frameworks]"
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -n 2 --torchs-memory tests/torchs tests/interop/wrapping tests/interop/runs tests/interop/dropin/test_parts.py

test-versions:  ## the suite beside Colab's versions, today's and the newest: two hours, and 10 GB of disk at a time
	tests/versions.sh

test-gpu: $(VENV)/.gpu  ## what only a GPU can show, in four minutes; GPU=python3 for a Python that has torch and jax with CUDA
	$(GPU) -m pytest -q tests/gpu

bench-gpu: $(VENV)/.gpu  ## the drop-in on a GPU beside torch, in four minutes; page in benchmarks/results
	$(GPU) -m benchmarks.gpu

test-jax:  ## a part of jopt's tests beside the oldest JAX that is supported and the newest, without torch
	tests/versions.sh jax-oldest jax-newest

dist: $(VENV)/.dev  ## the wheel and the source archive, in dist/: the same bytes from the same commit
	$(BIN)/python -m tools.release

bench: $(VENV)/.dev  ## steps, training, compiling and memory against torch and optax; pages and plots in benchmarks/results
	$(BIN)/python -m benchmarks

workloads: $(VENV)/.dev  ## four models trained by torch, the drop-in and jopt in JAX; page and plot in benchmarks/results
	$(BIN)/python -m benchmarks.workloads

parity: $(VENV)/.dev  ## every configuration of torch's table against torch, 20 minutes; table and plot in docs
	$(BIN)/python -m benchmarks.parity

docs: $(VENV)/.docs  ## the site, in out/site; it reads without a network: open out/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

pictures: $(VENV)/.dev  ## draw the pictures of docs, write the notebooks
	$(BIN)/python -m benchmarks.draw_schedules
	$(BIN)/python -m examples.porting_a_run --out docs/porting.png
	$(BIN)/python -m examples.vanishing_gradients --out docs/vanishing_gradients.png
	$(BIN)/python -m examples.notebooks

choosing: $(VENV)/.dev  ## docs/choosing.md: what sweeps say to the usual advice, 6 minutes
	$(BIN)/python -m benchmarks.choosing

ahead-of-time: $(VENV)/.dev  ## docs/ahead-of-time.md and the memory of docs/many-devices.md: what is compiled for TPUs and a GPU that are not there, 20 minutes
	$(BIN)/python -m pip install -q $(TORCH) -e ".[aot]"
	$(PYTHON) -m venv .venv-colab-compiler
	.venv-colab-compiler/bin/python -m pip install -q jax==0.7.2 jaxlib==0.7.2 libtpu==0.0.21.1 numpy==2.1.3 optax==0.2.8 pytest -e .
	$(BIN)/python -m benchmarks.ahead_of_time --colab .venv-colab-compiler/bin/python
	rm -rf .venv-colab-compiler
	$(BIN)/python -m benchmarks.many_devices

lint: $(VENV)/.dev  ## what pre-commit runs
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

lint-workflows: $(VENV)/.dev  ## .github by its schemas, and what a workflow should not do
	$(BIN)/python -m pip install -q -e ".[release]"
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[0-9]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline .github

lock: $(VENV)/.dev  ## requirements/dev.txt: the newest of what make test and make lint need, with hashes
	$(BIN)/python -m pip install -q -e ".[release]"
	echo "$(TORCH)+cpu" | $(BIN)/uv pip compile pyproject.toml - --upgrade --extra dev --extra release \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate \
		--find-links $(TORCHS) --custom-compile-command "make lock" -o requirements/dev.txt

clean:
	rm -rf $(VENV) .cache out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

ifeq ($(GPU),$(VENV)-gpu/bin/python)
$(VENV)/.gpu: pyproject.toml
	$(PYTHON) -m venv $(VENV)-gpu
	$(GPU) -m pip install -q torch -e ".[test]"
	$(GPU) -m pip install -q "jax[cuda$$($(GPU) -c 'import torch; print(torch.version.cuda.split(".")[0])')]"
	@mkdir -p $(VENV) && touch $@
else
.PHONY: $(VENV)/.gpu
$(VENV)/.gpu:
endif

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[demo]"
	@touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[docs]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@
