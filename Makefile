# make demo        predicts the sample images with the bundled model, and names the pictures
# make train-demo  the whole job on made-up data: data set, training, evaluation, predictions
# make test        the default tests
# make test-all, make lint

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
SAMPLES := src/rdsnet/samples

.PHONY: demo train-demo test test-all lint clean

$(VENV)/installed: pyproject.toml
	@echo "setting up $(VENV): about 5 GB are downloaded, which takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO)/nuclei
	$(BIN)/rdsnet predict $(SAMPLES) --weights nuclei --output $(DEMO)/nuclei/predictions
	$(BIN)/rdsnet visualize --truth $(SAMPLES)/samples.json --weights nuclei --what comparison refinement \
	  --output $(DEMO)/nuclei/pictures
	@echo
	@echo "What the bundled model finds in the sample images: $(DEMO)/nuclei/predictions/*.png (boxes before refinement dashed)"
	@echo "Truth, prediction and errors: $(DEMO)/nuclei/pictures/*_comparison.png"
	@echo "How a mask moves its box: $(DEMO)/nuclei/pictures/*_refinement.png"
	@echo "To try your own images on a page: $(BIN)/rdsnet demo"
	@echo "To train on your own data: make train-demo shows it on made-up images, README.md on yours"

train-demo: $(VENV)/installed
	rm -rf $(DEMO)/shapes $(DEMO)/run $(DEMO)/evaluation $(DEMO)/new $(DEMO)/predictions
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
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(DEMO) build dist src/*.egg-info
