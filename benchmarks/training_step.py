"""What a training step costs, what of it is the mask loss, what checkpoints save, and how long it waits for data.

Forward and backward pass of an untrained network on the images of a COCO JSON with the most objects, by turns; medians.
The mask loss is what lies between the streams' outputs and the loss, gathering of representations included, both ways.

    python benchmarks/training_step.py --data coco-mini/train.json --short_side 800 --images 1 --positives 100
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rdsnet.benchmark.probes import alternate
from rdsnet.config import Config, get_config
from rdsnet.data.coco import CocoFolder
from rdsnet.data.loading import collate, train_loader
from rdsnet.model.build import build_model
from rdsnet.model.correlation import correlate
from rdsnet.model.rdsnet import RDSNet
from rdsnet.structures import Targets
from rdsnet.train.log import StepClock

Batch = tuple[Tensor, list[Targets]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="rdsnet_r50")
    parser.add_argument("--data", required=True, help="COCO JSON; images/ lies beside it")
    parser.add_argument("--short_side", type=int, default=800, help="pixels")
    parser.add_argument("--images", type=int, default=1, help="images a step")
    parser.add_argument("--positives", type=int, default=100, help="mask instances an image, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    config = get_config(arguments.preset)
    config.loss.max_masks, config.train.batch_size = arguments.positives, arguments.images
    config.data.train, config.data.short_side = arguments.data, arguments.short_side
    folder = CocoFolder(arguments.data, None)
    build = partial(network, config, len(folder.class_names), arguments.device)
    models = {"without masks": build(masks=False), "with masks": build(), "checkpointed": build(checkpoint=True)}
    images, targets = batch = crowded_batch(config, folder, arguments.device)
    print(f"input {tuple(images.shape)}, objects {[len(t) for t in targets]}, {torch.get_num_threads()} threads")
    report_times(models, batch, arguments.rounds)
    for name in ("with masks", "checkpointed"):
        print(f"{name}: at most {peak_bytes(models[name], batch) / 2**20:.0f} MiB beyond weights and batch")
    for workers in (0, 2):
        config.data.workers = workers
        print(f"{workers} workers: {waiting(models['with masks'], config, folder, arguments.rounds)}")


def network(config: Config, classes: int, device: str, *, masks: bool = True, checkpoint: bool = False) -> RDSNet:
    config.model.masks, config.train.checkpoint_activations = masks, checkpoint
    torch.manual_seed(0)
    return build_model(config, num_classes=classes, pretrained=False).to(device)


def crowded_batch(config: Config, folder: CocoFolder, device: str) -> Batch:
    """The images with the most objects, as the loader gives them."""
    data = train_loader(config, folder).dataset
    order = sorted(range(len(folder)), key=lambda i: len(folder.images[i].annotations), reverse=True)
    images, targets = collate([data[0, i] for i in order[: config.train.batch_size]])
    return images.to(device), [target.to(device) for target in targets]


def step(model: RDSNet, batch: Batch) -> None:
    losses = model.losses(*batch, torch.Generator().manual_seed(0))
    torch.stack(list(losses.values())).sum().backward()
    model.zero_grad()
    if batch[0].is_cuda:
        torch.cuda.synchronize()


def mask_loss(model: RDSNet, batch: Batch) -> Callable[[], None]:
    """The mask loss of a step with its backward pass, as far as the streams' outputs."""
    images, targets = batch
    with torch.no_grad():
        raw, pixels = model(model.normalise(images, [target.image_size for target in targets]))
        positives = model.object_stream.losses(raw, targets)[1]
    features = [feature.requires_grad_() for feature in raw.features]
    inputs = [pixels.requires_grad_(), *features, *model.object_stream.represent.parameters()]
    owners = [positives.object[positives.image == b].cpu() for b in range(len(targets))]
    known = [target.to("cpu") for target in targets]
    print("mask instances", [len(model.masks.choose(o, t, None)) for o, t in zip(owners, known, strict=True)])

    def work() -> None:
        chosen = model.choose(positives, targets, torch.Generator().manual_seed(0))
        own_vectors, own_objects = chosen.by_image(model.vectors(raw, chosen.image, chosen.anchor))
        terms = []
        for b, (vectors, objects) in enumerate(zip(own_vectors, own_objects, strict=True)):
            step = (raw.size[0] / pixels.shape[2], raw.size[1] / pixels.shape[3])
            crops = model.masks.crops(pixels[b], objects, targets[b], step=step, positives=chosen.positives[b])
            terms += [crop.loss(correlate(vectors, crop.pixels, crop.instances)) for crop in crops]
        torch.autograd.grad(torch.cat(terms).sum(), inputs)
        if images.is_cuda:
            torch.cuda.synchronize()

    return work


def report_times(models: dict[str, RDSNet], batch: Batch, rounds: int) -> None:
    parts: dict[str, Callable[[], None]] = {name: partial(step, model, batch) for name, model in models.items()}
    parts["mask loss"] = mask_loss(models["with masks"], batch)
    times = alternate(parts, rounds)
    for name, taken in times.items():
        share = median(taken) / median(times["with masks"])
        print(f"{name}: {median(taken):.3f} s ({min(taken):.3f} to {max(taken):.3f}), {share:.1%} of the step")


def peak_bytes(model: RDSNet, batch: Batch) -> int:
    """The most memory of tensors that a step holds at a time beyond what was there before it."""
    if batch[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        trace.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in changes))


def waiting(model: RDSNet, config: Config, folder: CocoFolder, rounds: int) -> str:
    """What share of the time steps wait for their batches, as a training counts it."""
    device, loader = model.image_mean.device, iter(train_loader(config, folder))
    for i in range(rounds + 1):
        if i <= 1:  # the first batch waits for the start of the workers
            clock = StepClock()
        images, targets = next(loader)
        batch = images.to(device), [target.to(device) for target in targets]
        clock.batch_came()
        step(model, batch)
        clock.batch_done()
        clock.wait()
    seconds = clock.step_done()["seconds/data"] / rounds
    return f"waiting {clock.share()} of the time, {seconds:.3f} s a step"


if __name__ == "__main__":
    main()
