"""Images to batches: the same batches for the same seed, however often a run was stopped and resumed."""

from __future__ import annotations

import traceback
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rdsnet.config import Config, DataConfig
from rdsnet.data.coco import CocoFolder
from rdsnet.data.records import ImageRecord
from rdsnet.data.transforms import Sample, eval_image, eval_size, padded_size, padding_multiple, train_transform
from rdsnet.structures import PADDING, MaskGrid, Targets

T = TypeVar("T", covariant=True)


class Samples(Dataset[T]):
    """A dataset that gives, in place of a batch's samples, the error of one that cannot be had (see `Loader`).

    Raised in a process of its own, an error would reach the training as a traceback in place of its message.
    """

    def __getitems__(self, indices: Sequence[Any]) -> list[T] | Exception:
        try:
            return [self[i] for i in indices]
        except (OSError, ValueError) as error:
            return error


class TrainDataset(Samples[Sample]):
    """Training samples of a COCO folder.

    The index is (epoch, i). Everything random comes from (seed, epoch, image id), so that a sample is the same in
    every process; i from the number of images on means the same images once more, drawn anew.
    """

    def __init__(self, folder: CocoFolder, config: DataConfig, grid: MaskGrid, seed: int) -> None:
        self.folder = folder
        self.config = config
        self.grid = grid
        self.seed = seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        epoch, i = index
        repeat, i = divmod(i, len(self))
        record = self.folder.images[i]
        identity = zlib.crc32(repr(record.id).encode())
        rng = np.random.default_rng((self.seed, epoch, identity, repeat))
        return train_transform(record.read(), record.annotations, self.config, self.grid, rng)


class EvalDataset(Samples[tuple[Tensor, ImageRecord]]):
    """Images of a COCO folder at the size of inference: (uint8 (3, h, w), record), in the order of the JSON."""

    def __init__(self, folder: CocoFolder, config: DataConfig) -> None:
        self.folder = folder
        self.config = config

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int) -> tuple[Tensor, ImageRecord]:
        record = self.folder.images[i]
        return eval_image(record.read(), self.config), record


class EpochOrder(Sampler[tuple[int, int]]):
    """The samples of one rank in one epoch, in an order that depends on (seed, epoch) alone.

    A shuffle of all images, cut into global batches of world_size x batch_size; the rest that fills none waits for
    another epoch's shuffle. A set smaller than one global batch is repeated until it fills it. Every rank has as many
    batches as the others.

    Args:
        images: number of images.
        batch_size: images of a batch of one rank.
        seed: of the shuffle.
        rank, world_size: this process and how many there are.
        epoch: that the next iteration goes through.
        start: batches of that epoch that are done already.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        if images < 1 or batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"expected images and a batch size of at least 1, and a rank below the world size, "
                f"got {images} images, batch size {batch_size}, rank {rank} of {world_size}"
            )
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batches = max(1, images // (batch_size * world_size))
        self.epoch, self.start = (epoch + 1, 0) if start == self.batches else (epoch, start)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch, unless it is the present one; Lightning calls it."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Samples of a whole epoch, wherever it starts."""
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        needed = len(self) * self.world_size
        repeats = -(-needed // self.images)
        order = np.concatenate([repeat * self.images + rng.permutation(self.images) for repeat in range(repeats)])
        batches = order[:needed].reshape(self.batches, self.world_size, self.batch_size)[:, self.rank]
        return iter([(self.epoch, i) for i in batches[self.start :].flatten().tolist()])


class Loader(DataLoader[Any]):
    """A DataLoader over `Samples`: what bad data raises comes out of its processes as it was raised.

    Nothing is fetched before the first batch is asked for.
    """

    def __init__(self, dataset: Samples[Any], collate: Callable[[Sequence[Any]], Any], **options: Any) -> None:
        super().__init__(dataset, collate_fn=partial(_collate_unless, collate), **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


class TrainLoader(Loader):
    """A Loader over `EpochOrder`. Lightning keeps its state with a checkpoint, and gives it back within an epoch."""

    sampler: EpochOrder

    def state_dict(self) -> dict[str, int]:
        """What must be the same to continue within an epoch; where that is, the training knows."""
        return {"of": len(self), "seed": self.sampler.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raise a ValueError for a state of other data, another seed, batch size or number of devices."""
        if (state["of"], state["seed"]) != (len(self), self.sampler.seed):
            raise ValueError(
                f"expected to continue an epoch of {state['of']} batches with seed {state['seed']}, got "
                f"{len(self)} batches with seed {self.sampler.seed}: resume with the data, batch size, devices and "
                "seed that the run began with"
            )


def _collate_unless(collate: Callable[[Sequence[Any]], Any], samples: Sequence[Any] | Exception) -> Any:
    return samples if isinstance(samples, Exception) else collate(samples)


def lost_a_process(error: BaseException) -> bool:
    """Whether torch raised an error because a process that loads images is gone: it may do so in any line of code."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = frames[-1].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, RuntimeError) and where.startswith("torch.utils.data.")


def pad_images(images: Sequence[Tensor], multiple: int = PADDING) -> Tensor:
    """uint8 images (3, h, w) as one (B, 3, H, W): zeros right and below, to multiples of `multiple` of the largest."""
    largest = max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    batch = torch.zeros(len(images), 3, *padded_size(largest, multiple), dtype=torch.uint8)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    return batch


def collate(samples: Sequence[Sample]) -> tuple[Tensor, list[Targets]]:
    """Images uint8 (B, 3, H, W), which are padded as their views say, zero-padded right and below to the largest; and
    their targets."""
    return pad_images([sample.image for sample in samples], 1), [sample.targets for sample in samples]


def _collate_eval(
    items: Sequence[tuple[Tensor, ImageRecord]], multiple: int
) -> tuple[Tensor, list[tuple[int, int]], list[ImageRecord]]:
    sizes = [(image.shape[1], image.shape[2]) for image, _ in items]
    return pad_images([image for image, _ in items], multiple), sizes, [record for _, record in items]


def train_loader(
    config: Config, folder: CocoFolder, rank: int = 0, world_size: int = 1, *, epoch: int = 0, start: int = 0
) -> TrainLoader:
    """Batches (images uint8 (B, 3, H, W), list of B `Targets`) for one rank, as `config` says.

    Args:
        rank, world_size, epoch, start: as of `EpochOrder`.
    """
    workers, batch_size = config.data.workers, config.train.batch_size
    grid = MaskGrid(2 ** min(config.model.pixel_levels), config.model.mask_stride)
    return TrainLoader(
        TrainDataset(folder, config.data, grid, config.seed),
        collate,
        batch_size=batch_size,
        sampler=EpochOrder(len(folder), batch_size, config.seed, rank, world_size, epoch=epoch, start=start),
        num_workers=workers,  # each of them runs torch on one thread
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def equal_shape_batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of images in batches of one padded shape, so that no image's result depends on its batch.

    Args:
        sizes: (h, w) of each image.
        batch_size: images of a batch, at most.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size}")
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, size in enumerate(sizes):
        groups[padded_size(size, PADDING)].append(i)
    # the largest first: what does not fit into memory fails at once
    shapes = sorted(groups, key=lambda shape: (-shape[0] * shape[1], shape))
    return [groups[shape][i : i + batch_size] for shape in shapes for i in range(0, len(groups[shape]), batch_size)]


def eval_batches(
    folder: CocoFolder, config: DataConfig, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> Loader:
    """Every image once, in batches of equal padded shape, so that no result depends on its batch.

    Args:
        batch_size: images of a batch, at most.
        workers: processes that load images; 0 for none.
        rank, world_size: every world_size-th batch, from the rank-th on, is this process's.

    Returns:
        An iterable with a length over (images uint8 (B, 3, H, W), their sizes (h, w) before padding, their records).
    """
    sizes = [eval_size(*record.size, config) for record in folder.images]  # known without opening them
    mine = equal_shape_batches(sizes, batch_size)[rank::world_size]
    return Loader(
        EvalDataset(folder, config),
        partial(_collate_eval, multiple=padding_multiple(config)),
        batch_sampler=mine,
        num_workers=min(workers, len(mine)),
        pin_memory=torch.cuda.is_available(),
    )
