# Everything runs in a virtual environment that the first command makes and fills.
#   make demo PYTHON=python3.12     choose the Python that the environment is made with
#   TTT_DETECTRON2=wheel make demo  choose where detectron2 comes from (tools/setup_env.py)
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# As many test processes as there are cores, at most four (each holds its own torch). One thread
# in each, because threads of several processes on the same cores only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4

# OpenMP's threads spin for milliseconds when they wait for each other. Where another program wants
# the same cores, a frame then takes 20 times as long (with this limit: twice); alone, no longer.
export GOMP_SPINCOUNT ?= 3000

.DELETE_ON_ERROR:
.PHONY: benchmark demo format help lint live setup test test-all test-slow

help:
	@echo "make demo       install what is missing, then adapt a model to a video and show it"
	@echo "make live       the same as a page in your browser, on a street that never ends"
	@echo "make test       install what is missing, then run the fast tests"
	@echo "make test-slow  the other tests; make test-all runs both"
	@echo "make benchmark  install what is missing, then compare all methods; ARGS=--quick is shorter"
	@echo "make lint       formatting, lint and types, as in CI; make format mends the formatting"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

setup: $(VENV)/bin/python
	@$(RUN) tools/setup_env.py

demo: setup
	$(RUN) tools/demo.py $(ARGS)

live: setup
	$(RUN) tools/live.py --world $(ARGS)

benchmark: setup
	$(RUN) tools/sweep.py benchmark $(ARGS)

test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

test-all: setup
	$(PYTEST) $(ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
