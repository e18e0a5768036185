"""Batches: the same for the same seed on any number of workers, and after a resume in mid-epoch."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rdsnet.config import Config, DataConfig, TrainConfig
from rdsnet.data.coco import CocoFolder
from rdsnet.data.loading import (
    EpochOrder,
    EvalDataset,
    Loader,
    Samples,
    TrainDataset,
    TrainLoader,
    collate,
    equal_shape_batches,
    eval_batches,
    lost_a_process,
    pad_images,
    train_loader,
)
from rdsnet.data.shapes import make_shapes
from rdsnet.data.transforms import Sample, eval_size
from rdsnet.structures import MaskGrid, Targets

GRID = MaskGrid(8, 4)


def config(workers: int = 0, batch_size: int = 2) -> Config:
    data = DataConfig(short_side=64, train_short_side=(48, 80), train_crop=64, rotate90=True, workers=workers)
    return Config(data=data, train=TrainConfig(batch_size=batch_size), seed=5)


def fingerprint(batch: tuple[torch.Tensor, list[Targets]]) -> tuple[int, tuple[float, ...]]:
    images, targets = batch
    return int(images.long().sum()), tuple(t.boxes.sum().item() for t in targets)


def epoch_of(loader: TrainLoader, epoch: int) -> list[Any]:
    loader.sampler.set_epoch(epoch)
    return [fingerprint(batch) for batch in loader]


def sample(height: int, width: int) -> Sample:
    grid = ((height + 31) // 32 * 8, (width + 31) // 32 * 8)
    targets = Targets(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, *grid, dtype=torch.bool),
        has_mask=torch.zeros(0, dtype=torch.bool),
        areas=torch.zeros(0),
        image_size=(height, width),
    )
    return Sample(torch.full((3, height, width), 9, dtype=torch.uint8), targets)


def test_collate_pads_to_the_largest() -> None:
    images, targets = collate([sample(32, 96), sample(64, 32)])
    assert images.shape == (2, 3, 64, 96)
    assert images.dtype == torch.uint8
    assert (images[0, :, :32] == 9).all() and images.sum() == 9 * 3 * (32 * 96 + 64 * 32)
    assert [t.image_size for t in targets] == [(32, 96), (64, 32)]


def test_images_are_padded_to_multiples_of_32_of_the_largest_or_as_asked() -> None:
    images = [sample(30, 70).image, sample(33, 20).image]
    batch = pad_images(images)
    assert batch.shape == (2, 3, 64, 96)
    assert (batch[0, :, :30, :70] == 9).all() and batch.sum() == 9 * 3 * (30 * 70 + 33 * 20)
    assert pad_images(images, 1).shape == (2, 3, 33, 70)
    assert equal_shape_batches([(30, 70), (33, 20), (31, 65)], 2) == [[0, 2], [1]]  # 32 x 96 and 64 x 32


def test_ranks_share_an_epoch_without_overlap() -> None:
    ranks = [EpochOrder(11, 2, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    first, second = ([i for _, i in rank] for rank in ranks)
    assert ranks[0].batches == ranks[1].batches == 2  # 11 images make 2 global batches of 4
    assert len({*first, *second}) == len(first) + len(second) == 8


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = EpochOrder(20, 4, seed=1)
    zero = list(order)
    assert list(order) == zero
    order.set_epoch(3)
    three = list(order)
    assert {epoch for epoch, _ in three} == {3}
    assert [i for _, i in three] != [i for _, i in zero]
    other = EpochOrder(20, 4, seed=2)
    assert list(other) != zero


def test_set_smaller_than_a_global_batch_is_repeated_with_other_randomness(shapes_folder: Path) -> None:
    indices = [i for rank in (0, 1) for _, i in EpochOrder(3, 4, 0, rank, 2)]
    assert EpochOrder(3, 4, seed=0, rank=0, world_size=2).batches == 1
    assert len(indices) == len(set(indices)) == 8
    assert sorted(i % 3 for i in indices) in (
        [0, 0, 0, 1, 1, 1, 2, 2],
        [0, 0, 1, 1, 1, 2, 2, 2],
        [0, 0, 0, 1, 1, 2, 2, 2],
    )
    dataset = TrainDataset(CocoFolder(shapes_folder / "train.json"), config().data, GRID, seed=0)
    assert not torch.equal(dataset[0, 1].image, dataset[0, 1 + len(dataset)].image)


def test_sample_depends_on_seed_epoch_and_image_alone(shapes_folder: Path) -> None:
    folder = CocoFolder(shapes_folder / "train.json")
    first, again, other = (TrainDataset(folder, config().data, GRID, seed) for seed in (0, 0, 1))
    expected = first[3, 1].image
    again[0, 2]  # what was asked for before makes no difference
    assert torch.equal(again[3, 1].image, expected)
    assert not torch.equal(again[4, 1].image, expected)
    assert not torch.equal(other[3, 1].image, expected)


def test_batches_do_not_depend_on_workers(shapes_folder: Path) -> None:
    folder = CocoFolder(shapes_folder / "train.json")
    alone, two = (train_loader(config(workers), folder) for workers in (0, 2))
    for epoch in (0, 1):
        assert epoch_of(alone, epoch) == epoch_of(two, epoch)
    assert epoch_of(alone, 0) != epoch_of(alone, 1)


def test_workers_run_on_one_thread() -> None:
    class Threads(Samples[int]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: tuple[int, int]) -> int:
            return torch.get_num_threads()

    loader = Loader(Threads(), list, sampler=EpochOrder(2, 1, 0), num_workers=2)
    assert list(loader) == [[1], [1]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_begins_where_it_is_told_and_goes_on_with_whole_epochs(shapes_folder: Path, workers: int) -> None:
    folder = CocoFolder(shapes_folder / "train.json")
    whole = train_loader(config(), folder)
    resumed = train_loader(config(workers), folder, epoch=2, start=3)
    assert len(resumed) == 4
    assert epoch_of(resumed, 2) == epoch_of(whole, 2)[3:]
    assert epoch_of(resumed, 3) == epoch_of(whole, 3)
    assert epoch_of(resumed, 2) == epoch_of(whole, 2)  # the start is spent
    next_epoch = train_loader(config(workers), folder, epoch=1, start=4)
    assert epoch_of(next_epoch, 2) == epoch_of(whole, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_keeps_its_type_and_message(shapes_folder: Path, workers: int) -> None:
    folder = CocoFolder(shapes_folder / "train.json")
    loader = train_loader(config(workers), folder)
    for record in folder.images:
        record.path = record.path.with_name("gone.png")
    with pytest.raises(FileNotFoundError, match=r"^[^\n]*gone\.png[^\n]*$"):
        list(loader)


def test_a_killed_process_is_told_from_other_errors(shapes_folder: Path) -> None:
    others = multiprocessing.active_children()
    batches = iter(train_loader(config(workers=1), CocoFolder(shapes_folder / "train.json")))
    next(batches)
    (process,) = set(multiprocessing.active_children()) - set(others)
    with pytest.raises(RuntimeError) as killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        list(batches)
    assert lost_a_process(killed.value)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not lost_a_process(other.value)


def test_state_of_another_run_is_refused(shapes_folder: Path) -> None:
    folder = CocoFolder(shapes_folder / "train.json")
    state = train_loader(config(), folder).state_dict()
    train_loader(config(workers=1), folder, start=2).load_state_dict(state)
    with pytest.raises(ValueError, match="expected to continue an epoch of 4 batches"):
        train_loader(config(batch_size=4), folder).load_state_dict(state)


class Recorder(lightning.LightningModule):
    """Notes what it is given, and stops like a killed process after some batches."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []
        self.stop_after = stop_after

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(fingerprint(batch))
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: Recorder, loader: TrainLoader, folder: Path, resume: str | None, **limits: int) -> list[Any]:
    checkpoints = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **limits,
    )
    try:
        trainer.fit(module, loader, ckpt_path=resume)
    except (KeyboardInterrupt, SystemExit):
        assert module.stop_after is not None
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 12, "max_epochs": -1}])
def test_lightning_resumes_with_the_batches_of_an_uninterrupted_run(
    shapes_folder: Path, tmp_path: Path, limits: dict[str, int]
) -> None:
    folder = CocoFolder(shapes_folder / "train.json")  # 8 images: 4 batches an epoch
    straight = fit(Recorder(), train_loader(config(), folder), tmp_path / "straight", None, **limits)
    assert len(straight) == 12
    for stop in (1, 3, 4, 5, 8, 11):  # also at the ends of epochs
        run = tmp_path / f"stop_{stop}"
        before = fit(Recorder(stop), train_loader(config(), folder), run, None, **limits)
        epoch, start = divmod(len(before), 4)
        after = fit(
            Recorder(),
            train_loader(config(workers=stop % 3), folder, epoch=epoch, start=start),
            run / "resumed",
            str(run / "last.ckpt"),
            **limits,
        )
        assert before + after == straight, f"stopped after {stop}"


def test_eval_batches_have_one_padded_shape_and_every_image_once(coco_folder: Path) -> None:
    folder = CocoFolder(coco_folder / "val.json")
    data = DataConfig(short_side=32, long_side=64)
    # sizes 32 x 48, 32 x 46 (47 x 33 scaled by 32 / 33) and 32 x 32
    assert [eval_size(*record.size, data) for record in folder.images] == [(32, 48), (32, 46), (32, 32)]
    batches = list(eval_batches(folder, data, batch_size=2, workers=0))
    assert [images.shape for images, _, _ in batches] == [(2, 3, 32, 64), (1, 3, 32, 32)]
    assert [[record.id for record in records] for _, _, records in batches] == [[0, 5], [7]]
    assert batches[0][1] == [(32, 48), (32, 46)]
    image, record = EvalDataset(folder, data)[1]
    assert record.id == 5
    torch.testing.assert_close(batches[0][0][1, :, :, :46], image)
    assert (batches[0][0][1, :, :, 46:] == 0).all()


def test_squashed_images_are_batched_together_and_not_padded(coco_folder: Path) -> None:
    folder = CocoFolder(coco_folder / "val.json")
    settings = Config(data=DataConfig(square=50, antialias=False, workers=0), train=TrainConfig(batch_size=3))
    batches = list(eval_batches(folder, settings.data, batch_size=3, workers=0))
    assert [images.shape for images, _, _ in batches] == [(3, 3, 50, 50)]
    assert batches[0][1] == [(50, 50)] * 3
    images, targets = next(iter(train_loader(settings, folder)))
    assert images.shape == (3, 3, 50, 50)
    assert [t.image_size for t in targets] == [(50, 50)] * 3
    assert {t.masks.shape[1:] for t in targets} == {(14, 14)}  # 7 cells of the finest level's stride 8, twice as fine
    crowds = [box for t in targets for box in t.crowd_boxes.tolist()]
    assert crowds == [pytest.approx([0, 0, 50, 10 * 50 / 33])]  # rows 0..10 of 33; flips left and right change nothing


def test_mask_grid_follows_the_finest_level_of_the_pixel_stream(shapes_folder: Path) -> None:
    settings = config()
    settings.model.pixel_levels, settings.model.mask_stride = (2, 3), 2
    _, targets = next(iter(train_loader(settings, CocoFolder(shapes_folder / "train.json"))))
    assert {t.masks.shape[1:] for t in targets} == {(32, 32)}  # 64 pixels


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_are_shared_among_ranks(tmp_path: Path, workers: int) -> None:
    make_shapes(tmp_path, images=1, val_images=7, size=32)
    folder = CocoFolder(tmp_path / "val.json")
    data = DataConfig(short_side=32, long_side=64)
    shares = [
        [record.id for _, _, records in eval_batches(folder, data, 2, workers, rank, 3) for record in records]
        for rank in range(3)
    ]
    assert [len(share) for share in shares] == [3, 2, 2]
    assert sorted(id for share in shares for id in share) == list(range(1, 8))
