"""Make a run the weights that come with the package: half precision, without the paths of the machine it ran on.

python benchmarks/bundle.py runs/nuclei nuclei
"""

import argparse
from pathlib import Path

from rdsnet.weights import checkpoint
from rdsnet.weights.bundled import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", choices=WEIGHTS)
    options = parser.parse_args()
    model, stored = checkpoint.load(options.run)
    data = stored.config.data
    data.train = data.val = data.train_images = data.val_images = None
    path = WEIGHTS[options.name]
    checkpoint.save(path, model, stored.config, stored.class_names, stored.category_ids, half=True)
    print(f"{path.stat().st_size / 1e6:.1f} MB: {path}")


if __name__ == "__main__":
    main()
