"""What a GPU makes of it: images a second with the masks left on it, what Python waits for, and training steps.

    python benchmarks/gpu.py --output runs/gpu.json [--preset rdsnet_r101] [--size 800 1333]

Weights are random, images are made and lie on the GPU, 100 boxes are drawn in place of what NMS leaves. Contestants
take turns; medians. Where there is no GPU, `--device cpu --preset rdsnet_tiny --size 128 192` shows what it does.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from peers import box_targets
from rdsnet.benchmark.probes import alternate, draw_boxes, forced_objects, machine, steer_candidates
from rdsnet.benchmark.run import CANDIDATES
from rdsnet.config import get_config
from rdsnet.device import Device, Precision
from rdsnet.files import write_text
from rdsnet.model.build import build_model
from rdsnet.predict.predictor import untrained
from rdsnet.structures import ceil32

OBJECTS = 100
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
CONTESTANTS: dict[str, tuple[Precision, bool]] = {
    "float32": ("32", False),
    "bfloat16": ("bf16-forced", False),
    "bfloat16, compiled": ("bf16-forced", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="rdsnet_r101")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="pixels")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--train_batch", type=int, default=16, help="images of a training step")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --preset rdsnet_tiny --size 128 192 shows what this measures")
    device, size = arguments.device, tuple(arguments.size)
    result: dict[str, Any] = {"preset": arguments.preset, "size": size, "machine": machine()}

    found = {
        name: predictions(arguments.preset, size, device, arguments.batch_sizes, *how)
        for name, how in CONTESTANTS.items()
    }
    functions = {f"{name}, batch {count}": run for name, runs in found.items() for count, run in runs.items()}
    functions["training, bfloat16"] = training_step(arguments.preset, size, device, arguments.train_batch)
    seconds = alternate(functions, arguments.rounds)
    images = [count for runs in found.values() for count in runs] + [arguments.train_batch]
    result["images_per_second"] = {
        name: count / median(taken) for (name, taken), count in zip(seconds.items(), images, strict=True)
    }
    for name, speed in result["images_per_second"].items():
        print(f"{name:32s} {speed:8.2f} images/s")
    if device == "cuda":
        result["waits"] = waits(functions["float32, batch 1"])
        print("waits of one image:", result["waits"])
    if arguments.output:
        write_text(arguments.output, json.dumps(result, indent=1))


def predictions(
    preset: str,
    size: tuple[int, int],
    device: Device,
    batch_sizes: list[int],
    precision: Precision,
    compile: bool,
) -> dict[int, Callable[[], None]]:
    """Runs of the model on batches that lie on the device, by their number of images."""
    predictor = untrained(preset, device=device, precision=precision, compile=compile)
    photo = batch(1, size, "cpu")[0, :, : size[0], : size[1]].permute(1, 2, 0).numpy()
    steer_candidates(predictor, photo, CANDIDATES)
    find = forced_objects(predictor.model.object_stream, draw_boxes(OBJECTS, size))

    def run(images: Tensor) -> None:
        sizes = [size] * len(images)
        predictor.model.detect(images, sizes, sizes, find=find)

    return {count: partial(run, batch(count, size, device)) for count in batch_sizes}


def batch(count: int, size: tuple[int, int], device: Device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    padded = (ceil32(size[0]), ceil32(size[1]))
    images = torch.randint(0, 256, (count, 3, *padded), generator=generator, dtype=torch.uint8)
    return images.to(device).contiguous(memory_format=torch.channels_last)


def training_step(preset: str, size: tuple[int, int], device: Device, count: int) -> Callable[[], None]:
    """Forward, losses, backward and SGD under autocast, with 20 objects an image whose masks are their boxes."""
    config = get_config(preset)
    model = build_model(config, num_classes=80, pretrained=False).to(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    images = batch(count, size, device)
    boxes = draw_boxes(20, size)
    stride = config.model.mask_stride
    cells = (images.shape[2] // stride, images.shape[3] // stride)
    target = box_targets(boxes, torch.arange(len(boxes)), size, stride, cells).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            losses = model.losses(images, [target] * count)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def waits(run: Callable[[], None]) -> dict[str, int]:
    """How often one run waits for the GPU, by the call that does; copies from and to pageable memory wait as well."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
    return dict(Counter(e.name for e in trace.events() if e.name in WAITS or "Pageable" in e.name))


if __name__ == "__main__":
    main()
