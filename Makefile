# make demo   the whole job on made-up data: data set, training, evaluation, predictions
# make test   the default tests
# make test-all, make lint

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test test-all lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/rdsnet shapes $(DEMO)/shapes --images 200 --val_images 40 --size 128
	$(BIN)/rdsnet check $(DEMO)/shapes/train.json
	$(BIN)/rdsnet train --preset rdsnet_tiny --data.train $(DEMO)/shapes/train.json --data.val $(DEMO)/shapes/val.json \
	  --data.short_side 128 --train.epochs 12 --output $(DEMO)/run
	$(BIN)/rdsnet evaluate $(DEMO)/run --data.val $(DEMO)/shapes/val.json --output $(DEMO)/evaluation
	$(BIN)/rdsnet shapes $(DEMO)/new --images 20 --val_images 4 --size 128 --seed 1
	$(BIN)/rdsnet predict $(DEMO)/new/images --weights $(DEMO)/run --output $(DEMO)/predictions
	@echo
	@echo "New images with what the model found: $(DEMO)/predictions/*.png"
	@echo "Validation images, truth beside prediction: $(DEMO)/run/predictions/*.jpg"
	@echo "To train on your own data: $(BIN)/rdsnet train --help, and README.md"

test: $(VENV)/installed
	$(BIN)/python -m pytest -q

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -q -m ''

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build dist src/*.egg-info
