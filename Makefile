# Each target installs what it needs (.ci/uv finds or installs uv; uv installs the locked packages) and runs one thing.
# Every engine setting passes through: `make serve PORT=9000 MODEL=hf://org/name` (docs/settings.md lists them).

RUN := .ci/uv run --frozen

# On a machine with a GPU: `make bench-gpu PYTHON=python3` runs this tree with that interpreter and its torch, and installs nothing.
GPU_RUN := $(if $(PYTHON),PYTHONPATH="$(CURDIR):$(CURDIR)/engine" $(PYTHON),$(RUN) --group test --group bench python)

# The scenarios and the demo share what the operator's tests stand on.
E2E := PYTHONPATH="$(CURDIR)/tests/support:$(CURDIR)/tests/house" $(RUN) --group test python

.DEFAULT_GOAL := help
.PHONY: help serve test test-engine test-operator test-faults control-plane test-gpu bench bench-gpu bench-operator lint style imports types budgets format manifests chart docs images release-images test-images test-e2e e2e demo demo-down

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 14

serve: ## run the engine on the small model
	@echo "Installing what is missing (the first time a few minutes: PyTorch alone is 2.6 GB), then starting the engine"
	@exec $(RUN) --group demo python -m pagedserve_engine serve

test: test-engine test-operator test-e2e ## every test that needs no GPU (the matrix of faults has a target of its own)

test-engine: ## the engine's tests, on the CPU
	$(RUN) --group test pytest -m "not gpu" tests/engine

test-operator: control-plane ## the operator's tests, on a real control plane
	$(RUN) --group test pytest -m "not faults" tests/operator

test-faults: control-plane ## every call of a resource's life struck by every fault (about ten minutes)
	$(RUN) --group test pytest -s -m faults tests/operator

test-e2e: control-plane ## the end-to-end scenarios on the local provider
	E2E_PROVIDER=local $(RUN) --group test pytest -s e2e

e2e: ## the same scenarios on E2E_PROVIDER=kind (default), existing or local; DRY_RUN=1 renders kind's plan
	$(E2E) -m e2e.run

demo: ## from an empty cluster to an autoscaled service and back in one command; KEEP=1 leaves it up
	$(E2E) -m e2e.demo

demo-down: ## end what a demo left
	$(E2E) -m e2e.demo down

control-plane: ## build etcd, the API server, their kin and helm once (about ten minutes), or find them built
	$(RUN) --group test python e2e/controlplane/build.py e2e/controlplane e2e/helm

test-gpu: ## the tests that need a CUDA device
	$(GPU_RUN) -m pytest -m gpu -W default $$(grep -lrE "mark\.gpu|triton_device" --include="test_*.py" tests/engine)

bench: ## figures beside peers on a CPU: table, bars, plots
	$(RUN) --group test --group bench python -m benchmarks $(BENCH_ARGS)

bench-gpu: ## the engine on a GPU against the card's limits and its peer, in eight minutes
	$(GPU_RUN) -m benchmarks.gpu $(BENCH_ARGS)

bench-operator: control-plane ## a thousand InferenceServices at once, then ten minutes of nothing
	$(RUN) --group test --group bench python -m benchmarks.operator_scale

lint: style imports types budgets ## style, import directions, types, size budgets, generated documents

style:
	$(RUN) --group lint ruff check
	$(RUN) --group lint ruff format --check

imports:
	$(RUN) --group lint lint-imports --no-logo

types:
	$(RUN) --group lint mypy

budgets:
	$(RUN) --group test python tests/house/budgets.py
	$(RUN) --group test pytest -q tests/house

format: ## let ruff repair what it can
	$(RUN) --group lint ruff check --fix && $(RUN) --group lint ruff format

manifests: ## write manifests/install.yaml again
	$(RUN) --group test python tests/house/bundle.py

chart: ## write what is made of the Helm chart again
	$(RUN) --group test python tests/house/helm_chart.py

docs: ## write the generated documents again
	$(RUN) --group test python tests/house/reference.py

images: ## build the images: VARIANT=cuda|cpu, BASE_IMAGE, IMAGE_PREFIX (docs/images.md)
	@python3 .ci/images/build.py

release-images: ## the same from the base's digest, for a commit: PUSH=true
	@python3 .ci/images/release.py

test-images: ## the images themselves, where they are built
	$(RUN) --group test pytest tests/images
