# Each target sets up what it needs; `make quickstart` is the place to start.
export OMP_WAIT_POLICY ?= PASSIVE
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart setup test lint format wheel-check bench bench-adapters bench-compositions bench-fusion pocket clean

quickstart: setup  ## train, mix, fuse and measure two adapters: about five minutes
	$(BIN)/mmpeft quickstart --out runs/quickstart

setup: $(READY)  ## make .venv and install

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

test: setup  ## the whole suite, two tests at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel-check: setup  ## install the built wheel into a clean environment and use it from elsewhere
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/mmpeft-*.whl
	cd build/wheel && env/bin/mmpeft doctor && env/bin/mmpeft generate "red apple" --steps 2 --out apple.png

bench: setup  ## one training step at the true size of Stable Diffusion 1.5
	$(BIN)/python benchmarks/sd15_step.py

bench-adapters: setup  ## train and score two styles and a subject on the embedded base
	$(BIN)/python benchmarks/adapters.py

bench-compositions: setup  ## train two styles and a subject, compose them by every strategy, score and draw them
	$(BIN)/python benchmarks/compositions.py

bench-fusion: setup  ## composition, live mixing and fusing beside PEFT and diffusers: four minutes of one core
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fusion.py

pocket: setup  ## rebuild the embedded base from the published image packages: hours
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pocket]'
	OMP_NUM_THREADS=1 $(BIN)/python -m mmpeft.pocket.rebuild runs/pocket

clean:
	rm -rf .venv build dist runs
