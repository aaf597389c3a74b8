PYTHON ?= python3
BIN := .venv/bin
CODE := graphopt tests docs examples $(wildcard benchmarks)
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet  # into build/docs; the variable: no news of mkdocs 2

FUZZ_SECONDS ?= 3600

.PHONY: demo test fast-tests test-slow fuzz bench examples docs lint venv

demo: venv
	$(BIN)/graphopt demo

test: venv  # types are checked beside the tests
	$(MAKE) --no-print-directory -j 2 lint fast-tests

fast-tests: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/.slow .venv-tf/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow
	.venv-tf/bin/python -m pytest -n 2 -m slow tests/backends/test_tensorflow.py tests/passes/test_dequantize.py \
		tests/serving/test_repositories.py

fuzz: venv
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(or $(FUZZ_SEED),0)

bench: .venv/.bench
	$(BIN)/python -m benchmarks.run --out out/bench

examples: venv  # at full size; writes examples/expected
	$(BIN)/python examples

docs: venv
	$(MKDOCS)

lint: venv
	$(BIN)/ruff check --quiet $(CODE) passes backends  # ruff doesn't follow the links in graphopt/; mypy does
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache
	$(MKDOCS)

venv: .venv/.installed

# torch goes first and alone: pip reads PIP_EXTRA_INDEX_URL, and where that names an index of CPU builds, the build
# without CUDA is taken (its local version sorts higher) and satisfies everything that follows.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev,demo]"
	touch $@

# DeepSpeed compiles kernels as it is first used. TensorFlow is large, and stays out of the way of the others.
.venv/.slow: .venv/.installed
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[deepspeed]"
	touch $@

.venv-tf/.installed: pyproject.toml constraints.txt
	test -x .venv-tf/bin/python || $(PYTHON) -m venv .venv-tf
	.venv-tf/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 -c constraints.txt
	.venv-tf/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev,demo,tf]" \
		tensorflow-serving-api
	touch $@

# The tools that the benchmarks compare with are large, and tests need none of them.
.venv/.bench: .venv/.installed
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@
